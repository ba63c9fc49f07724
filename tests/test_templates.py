"""Templates: the published layouts, and errors that list the choices."""

import pytest

from data.templates import TEMPLATES, template


def conversation(name, rounds):
    return "".join(part.text for part in template(name).parts(rounds))


def test_llava_v1_reads_as_published():
    text = conversation("llava_v1", [("Hi", "Hello."), ("Ok", "Yes.")])
    assert text == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: Hi ASSISTANT: Hello.</s>"
        "USER: Ok ASSISTANT: Yes.</s>"
    )


def test_vicuna_v1_differs_in_the_person_only():
    rounds = [("Hi", "Hello.")]
    human = conversation("llava_v1", rounds)
    assert conversation("vicuna_v1", rounds) == human.replace("curious human", "curious user").replace(
        "the human's", "the user's"
    )


def test_llama_2_reads_as_published():
    text = conversation("llava_llama_2", [("Hi", "Hello."), ("Ok", "Yes.")])
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able")
    assert text.endswith("natural language.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Ok [/INST] Yes. </s>")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_questions_are_inserted_verbatim(name):
    question = "{question} {x} %s \\1 </SYS>"
    for first in (True, False):
        assert template(name).prefix(question, first=first).count(question) == 1


def test_an_unknown_template_lists_the_choices():
    with pytest.raises(
        ValueError,
        match=r"'llava_v2' .*did you mean 'llava_v1'.*llava_llama_2, llava_v1, qwen_chat, qwen_system, vicuna_v1",
    ):
        template("llava_v2")
