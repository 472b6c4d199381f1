"""Table 5 of the FlexGen paper: accuracy and perplexity with 4 bits, and with 4 bits and sparse attention."""
