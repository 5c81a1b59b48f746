"""A recipe's model, opened."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.engines import open_engine
from distill.recipe import Engine
from eval.endpoint_sampler import EndpointSampler
from eval.local_sampler import TransformersSampler
from eval.samplers import Request
from tests.eval.models import tiny_lm, tiny_tokenizer
from tests.eval.stub_server import StubServer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_lm("deepseek", ends=4.0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def engine(**values: Any) -> Engine:
    return Engine(**{**dict(engine="transformers", model="m"), **values})


def test_a_checkpoint_of_ours_is_opened_with_our_model(checkpoint: Path) -> None:
    sampler = open_engine(engine(model=str(checkpoint), batch_size=3, context_length=77, dtype="bfloat16"))
    assert isinstance(sampler, TransformersSampler)
    assert type(sampler.model).__module__ == "modeling_deepseek.modeling_deepseek"
    assert (sampler.batch_size, sampler.context_length, sampler.identity["dtype"]) == (3, 77, "bfloat16")
    prompt = sampler.render([{"role": "user", "content": "2 + 2"}], open_thought=True)
    ((_, completion),) = sampler.sample([Request(prompt, max_tokens=4)])
    assert completion.error is None


def test_the_same_checkpoint_is_the_same_teacher_and_another_is_not(checkpoint: Path, tmp_path: Path) -> None:
    first = open_engine(engine(model=str(checkpoint), batch_size=3)).identity
    assert first == open_engine(engine(model=str(checkpoint), batch_size=9)).identity
    tiny_lm("deepseek", seed=1).save_pretrained(checkpoint := tmp_path)
    tiny_tokenizer().save_pretrained(checkpoint)
    assert first["weights"] != open_engine(engine(model=str(checkpoint))).identity["weights"]


def test_an_endpoint_is_asked_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    with StubServer(api_key="secret") as server:
        sampler = open_engine(
            engine(
                engine="endpoint", model="stub", base_urls=[server.url], api_key_env="TEACHER_KEY", concurrency=5,
                timeout=7.0, retries=2, extra_body={"top_k": 5}, context_length=99, revision="abc",
            )
        )  # fmt: skip
        assert isinstance(sampler, EndpointSampler)
        assert (sampler.concurrency, sampler.timeout, sampler.retries, sampler.context_length) == (5, 7.0, 2, 99)
        assert sampler.identity["revision"] == "abc"
        prompt = sampler.render([{"role": "user", "content": "2 + 2"}], open_thought=True)
        ((_, completion),) = sampler.sample([Request(prompt, max_tokens=4)])
        assert completion.error is None
        assert server.bodies[-1]["top_k"] == 5


def test_a_tokenizer_beside_an_endpoint_renders_the_chat_here(checkpoint: Path) -> None:
    sampler = open_engine(engine(engine="endpoint", base_urls=["http://127.0.0.1:1/v1"], tokenizer=str(checkpoint)))
    prompt = sampler.render([{"role": "user", "content": "2 + 2"}], open_thought=True)
    assert isinstance(prompt, str)
    assert prompt.endswith("<think>\n")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model '.*/nothing' cannot be loaded"):
        open_engine(engine(model=str(tmp_path / "nothing")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"the model '{tmp_path}' cannot be loaded"):
        open_engine(engine(model=str(tmp_path)))


def test_an_endpoint_that_is_not_there_is_said_when_it_is_checked() -> None:
    with StubServer() as server:
        url = server.url
    sampler = open_engine(engine(engine="endpoint", base_urls=[url]))
    with pytest.raises(ConnectionError, match=url):
        sampler.check(())
    with StubServer(model="another") as server, pytest.raises(ValueError, match="'m' is not served there; served are"):
        open_engine(engine(engine="endpoint", base_urls=[server.url])).check(())


def test_nothing_heavy_is_imported_before_a_model_is_opened() -> None:
    program = (
        "import sys, distill.teacher, distill.engines, distill.problems, distill.cost, distill.rejection\n"
        "print({'torch', 'transformers', 'trl', 'datasets', 'pyarrow', 'scipy'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"
