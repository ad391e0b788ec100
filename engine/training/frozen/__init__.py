"""What frozen networks say of pairs, kept on the disk."""
