"""The judge: decode answers, score them, and say how much of it is luck."""
