"""Policy: row sizes, memory plan and roofline, all decided from sizes before anything is allocated."""
