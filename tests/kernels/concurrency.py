"""Several threads that call one operation at once."""

import threading
from collections.abc import Callable, Sequence


def failures_of(check: Callable[[object, object], None], inputs: Sequence, expected: Sequence) -> list[AssertionError]:
    """What `check(input, expected)` said, asked over and over by a thread for each input, all at once."""
    failures = []

    def work(index: int) -> None:
        try:
            for _ in range(25):
                check(inputs[index], expected[index])
        except AssertionError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return failures
