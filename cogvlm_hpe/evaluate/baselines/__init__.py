"""What a vision language model is compared with: networks that see one head's crop."""
