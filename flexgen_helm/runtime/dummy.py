def make_model(*a,**k): raise NotImplementedError
make_first_layers=make_model
