"""Stage 1: candidates or other people's pictures, their scores, pairs, latents, and the shards of them."""
