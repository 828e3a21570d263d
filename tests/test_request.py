"""Requests and jobs: what is refused, and how jobs end. No torch is needed for any of it."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from stepfuse.engine.errors import Cancelled, RequestError
from stepfuse.engine.request import Event, Job, Request, Result, build_request


def result() -> Result:
    return Result(images=["x"], latents=None, seeds=(1,), request=Request(prompt="a"), settings={}, timings={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected a whole number >= 1"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"steps": True}, "steps: got True"),
        ({"guidance_scale": math.nan}, "guidance_scale: got nan, expected a finite number"),
        ({"guidance_scale": math.inf}, "guidance_scale: got inf"),
        ({"guidance_scale": "7"}, "guidance_scale: got '7'"),
        ({"guidance_rescale": 1.5}, "from 0 to 1"),
        ({"eta": -0.1}, "eta: got -0.1"),
        ({"width": -64}, "width: got -64"),
        ({"n": 0}, "n: got 0"),
        ({"n": None}, "n: got None"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**63 - 1, "n": 2}, "choose a smaller seed"),
        ({"output": "jpg"}, "output: got 'jpg'.*valid: latent, np, pil, pt"),
        ({"negative_prompt": 3}, "negative_prompt: got int, expected text"),
        ({"deadline": -1.0}, "deadline: got -1.0, expected a finite number >= 0"),
        ({"deadline": math.inf}, "deadline: got inf"),
        ({"client": 3}, "client: got int, expected text"),
    ],
)
def test_impossible_values_are_refused_with_what_was_expected(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build_request("a cat", options)


def test_unknown_field_names_the_closest_one() -> None:
    with pytest.raises(RequestError, match="unknown request field 'guidence_scale': did you mean 'guidance_scale'"):
        build_request("a cat", {"guidence_scale": 2})
    with pytest.raises(RequestError, match="prompt: got int, expected text"):
        build_request(3, {})  # type: ignore[arg-type]


def test_fields_override_a_request_and_leave_it_unchanged() -> None:
    first = Request(prompt="a", steps=3, seed=1)
    second = build_request(first, {"steps": 5})
    assert (second.prompt, second.steps, second.seed, first.steps) == ("a", 5, 1, 3)


def test_job_ends_once_and_events_end_with_it() -> None:
    job = Job(Request(prompt="a"))
    for update in (1, 2):
        job.report(Event(update=update, total=2))
    first = result()
    job.finish(first)
    job.finish(RuntimeError("too late"))
    assert [event.update for event in job.events()] == [1, 2]
    assert [event.update for event in job.events()] == [1, 2], "a second reader sees all events, too"
    assert job.result() is first
    assert job.cancel() is False


def test_events_wait_for_news_from_another_thread() -> None:
    job, seen = Job(Request(prompt="a")), []
    reader = threading.Thread(target=lambda: seen.extend(event.update for event in job.events()))
    reader.start()
    for update in range(1, 6):
        job.report(Event(update=update, total=5))
    job.finish(result())
    reader.join(5)
    assert seen == [1, 2, 3, 4, 5]


def test_failed_job_raises_from_result_events_and_await() -> None:
    job = Job(Request(prompt="a"))
    job.finish(Cancelled("the job was cancelled"))
    with pytest.raises(Cancelled):
        job.result()
    with pytest.raises(Cancelled):
        list(job.events())

    async def wait() -> None:
        await job

    with pytest.raises(Cancelled):
        asyncio.run(wait())


def test_timeout_says_that_the_job_goes_on() -> None:
    with pytest.raises(TimeoutError, match="the job goes on"):
        Job(Request(prompt="a")).result(timeout=0.01)


def test_image_needs_exactly_one() -> None:
    many = Result(images=[1, 2], latents=None, seeds=(1, 2), request=Request(), settings={}, timings={})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="the result has 2 images"):
        _ = many.image
    assert result().image == "x"
