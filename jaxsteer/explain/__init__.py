"""What latents mean: words by mutual information, contexts, labels, and scores of all of these."""
