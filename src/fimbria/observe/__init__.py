"""Reading, decoding and enriching what the datapath reports."""
