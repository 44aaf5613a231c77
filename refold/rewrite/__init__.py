"""The rewrite engine: patterns, rules, the fixpoint driver, pipelines and their records."""
