"""Text and tokens of one job: preparation, chat, vocabulary, detokenizer, sampling, completion."""
