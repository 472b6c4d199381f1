"""Row sizes, memory plan, roofline: what is decided before anything is allocated."""
