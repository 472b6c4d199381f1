"""Text and tokens of one job: preparation, chat templates, sampling, detokenization, completion."""
