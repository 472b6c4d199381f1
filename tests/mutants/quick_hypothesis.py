"""A plugin of pytest: a mutant is killed by the first failure, so nothing is gained by a simpler one."""

from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False, database=None)
settings.load_profile("mutants")
