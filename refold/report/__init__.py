"""What a compilation did: the record, and its renderings."""
