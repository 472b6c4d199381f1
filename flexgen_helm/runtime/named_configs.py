NAMES=()
def named_config(n): return None
