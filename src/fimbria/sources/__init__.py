"""The only writers of intent."""
