"""Stage 1: candidates or pictures of others, their scores, pairs and latents, in shards."""
