"""Compiled layers: when a layer is traced anew, what it is given, and what is freed."""

from tests.mutants.mutant import Mutant

FORM = "tests/model/test_compiled.py::test_another_form_is_traced_anew"
GIVEN = "tests/model/test_compiled.py::test_weights_masks_and_numbers_are_those_of_each_call"
FREED = "tests/model/test_compiled.py::test_nothing_is_held_longer_than_it_is_read"
CUT = "tests/runtime/test_compiled_layers.py::test_cut_layers_have_the_bits_of_whole_ones"

MUTANTS = (
    Mutant(
        name="compiled-for-any-size",
        file="flexgen_helm/model/compiled/layers.py",
        old="(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)",
        new="(leaf.dtype, leaf.device)",
        tests=(FORM,),
        why="a row of another size runs a program that was made for the first one",
    ),
    Mutant(
        name="compiled-with-the-first-mask",
        file="flexgen_helm/model/compiled/trace.py",
        old='return Leaf("given", number)',
        new='return Leaf("constant", value)',
        tests=(GIVEN,),
        why="rows attend with the mask of the row that was traced",
    ),
    Mutant(
        name="compiled-weights-of-the-first-layer",
        file="flexgen_helm/model/compiled/trace.py",
        old="output = functional_call(layer, dict(zip(parameters, values, strict=True)), args, kwargs, strict=False)",
        new="output = layer(*args, **kwargs)",
        tests=(GIVEN,),
        why="all layers have the norms of one",
    ),
    Mutant(
        name="compiled-frees-nothing",
        file="flexgen_helm/model/compiled/program.py",
        old="        freeing.append(replace(step, freed=tuple(sorted(last))))",
        new="        freeing.append(step)",
        tests=(FREED,),
        why="a row holds all tensors of a layer at once",
    ),
    Mutant(
        name="compiled-not-named",
        file="flexgen_helm/runtime/building.py",
        old="model.compiled is not None, kernel",
        new="False, kernel",
        tests=(CUT,),
        why="answers of compiled layers and of others share a cache key",
    ),
)
