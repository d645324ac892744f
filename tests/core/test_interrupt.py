"""Signals wait for the end of a step; the second does not."""

import os
import signal
import threading

import pytest

from diffalign.core.interrupt import stop_between_steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number):
    with stop_between_steps() as request:
        assert request.received is None
        os.kill(os.getpid(), number)
        assert request.received is number


def test_the_second_signal_interrupts():
    seen = []

    def impatient():
        with stop_between_steps() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(request.received)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert seen == [signal.SIGTERM]


def test_the_answer_names_the_step_that_is_not_done_yet(capfd):
    """While hooks run, an evaluation for instance, the step before is done and will be saved."""
    for in_step, said in ((True, "finishing step 7; again: stop now, without saving that step"), (False, "stopping before the next step;")):
        with stop_between_steps() as request:
            request.step = 7
            if not in_step:
                request.release()
            os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err.startswith(said)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_between_steps():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(ZeroDivisionError), stop_between_steps():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_cannot_handle_signals_and_goes_without():
    seen = []

    def work():
        with stop_between_steps() as request:
            seen.append(request.received)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
    assert signal.getsignal(signal.SIGINT) == before
