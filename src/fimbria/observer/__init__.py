"""The observer: composition root of the flow reporting process."""
