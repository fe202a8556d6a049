"""Models: what each kind makes of texts and pairs, and how it is run."""
