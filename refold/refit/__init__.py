"""New weights for a folded graph, without folding it again."""
