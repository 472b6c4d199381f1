"""Suites over workers: who computes what, what is kept of a lost one, and what is refused."""

from tests.mutants.mutant import Mutant

SERVING = "tests/workers/test_serving.py"
DIVISION = "tests/workers/test_division.py"

MUTANTS = (
    Mutant(
        name="workers-share-no-answers-of-the-lost",
        file="flexgen_helm/workers/worker.py",
        old="Journal(place.journals, place.runs, helps=True)",
        new='Journal(place.journals / f"{os.urandom(4).hex()}", place.runs, helps=True)',
        tests=(f"{SERVING}::test_a_lost_worker_is_replaced_and_its_answers_are_kept",),
        why="what a lost worker has answered is computed again, and nobody finds it",
    ),
    Mutant(
        name="workers-do-not-look-for-the-folder",
        file="flexgen_helm/workers/worker.py",
        old="    place.meeting.find()\n",
        new="",
        tests=(f"{SERVING}::test_a_folder_that_is_not_shared",),
        why="hours of answers are written to a folder that nobody reads",
    ),
    Mutant(
        name="workers-do-not-agree-on-numerics",
        file="flexgen_helm/workers/worker.py",
        old="journal, console, place.meeting.agree)",
        new="journal, console)",
        tests=(f"{SERVING}::test_engines_that_compute_other_bits_do_not_answer_together",),
        why="a result depends on which host computed it",
    ),
    Mutant(
        name="workers-miss-answers-silently",
        file="flexgen_helm/workers/serving.py",
        old="        if workload.missing:\n",
        new="        if False:\n",
        tests=(f"{SERVING}::test_answers_that_are_nowhere",),
        why="the reason for missing answers is not said",
    ),
    Mutant(
        name="workers-forget-refused-requests",
        file="flexgen_helm/workers/serving.py",
        old="workload.fail(indices[at], result)",
        new="workload.fail(at, result)",
        tests=(f"{SERVING}::test_errors_of_entries_and_requests_are_those_of_one_worker",),
        why="another request than the refused one fails",
    ),
    Mutant(
        name="journal-half-a-record-is-passed-over",
        file="flexgen_helm/helm/journal.py",
        old="                self._ends[path] = line.end\n                key = _key(line)\n",
        new="                self._ends[path] = path.stat().st_size\n                key = _key(line)\n",
        tests=(f"{SERVING}::test_a_record_that_is_half_written_is_read_when_it_is_whole",),
        why="an answer that was being written is never read",
    ),
    Mutant(
        name="division-forgets-prefixes",
        file="flexgen_helm/workers/division.py",
        old="key=lambda place: (shared[place], -place)",
        new="key=lambda place: -place",
        tests=(DIVISION,),
        why="prompts of one long prefix are torn apart",
    ),
    Mutant(
        name="division-counts-no-new-tokens",
        file="flexgen_helm/workers/division.py",
        old="return len(self.text) / CHARACTERS + self.new_tokens",
        new="return len(self.text) / CHARACTERS",
        tests=(DIVISION,),
        why="one worker generates all long answers",
    ),
)
