"""How the time per request of a hybrid model falls with the number of requests."""
