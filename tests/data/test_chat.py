"""Conversations: which turns are learned, and how a turn ends."""

from __future__ import annotations

import pytest

from letters import CHATML, learned, letters
from loftq.data.chat import chat_examples, turn_ends
from loftq.data.examples import IGNORED
from loftq.data.rows import Row
from loftq.errors import ConfigError, SourceError


def rows(*values: dict) -> list[Row]:
    return [Row(v, f"f, line {i}") for i, v in enumerate(values, 1)]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_all_turns_of_the_assistant_are_learned_and_nothing_else():
    messages = [
        turn("system", "Be."),
        turn("user", "Hi"),
        turn("assistant", "Yo"),
        turn("user", "?"),
        turn("assistant", "!"),
    ]
    found = chat_examples(rows({"messages": messages}), letters(), 500)
    assert learned(found[0]) == "Yo<|im_end|>!<|im_end|>"
    text = letters().decode(found[0].input_ids)
    assert text == letters().apply_chat_template(messages, tokenize=False)
    assert (found[0].about["prompt"], found[0].about["reference"]) == (messages[:-1], "!")


def test_prompt_and_completion_as_a_conversation():
    found = chat_examples(rows({"prompt": "Hi", "completion": "Yo"}), letters(), 500)
    assert learned(found[0]) == "Yo<|im_end|>"


# as Qwen3's: of what the assistant thought (here all but the last letter) only the last turn's stays
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role == 'user' else m.content[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_turns_that_the_template_rewrites_later_are_examples_of_their_own():
    tokenizer = letters()
    tokenizer.chat_template = FORGETFUL
    messages = [turn("user", "Hi"), turn("assistant", "long"), turn("user", "?"), turn("assistant", "last")]
    messages += [turn("user", "!"), turn("assistant", "x")]  # nothing to forget
    plain = [turn("user", "Hi"), turn("assistant", "a"), turn("user", "?"), turn("assistant", "b")]
    found = chat_examples(rows({"messages": messages}, {"messages": plain}), tokenizer, 500)
    assert [learned(e) for e in found] == ["long<|im_end|>", "last<|im_end|>", "x<|im_end|>", "a<|im_end|>b<|im_end|>"]
    for i, n in enumerate((2, 4, 6)):
        assert letters().decode(found[i].input_ids) == tokenizer.apply_chat_template(messages[:n], tokenize=False)
        assert (found[i].about["prompt"], found[i].about["reference"]) == (
            messages[: n - 1],
            messages[n - 1]["content"],
        )
    assert (found.rows, found.notes()) == (2, [])


def test_the_reference_is_the_answer_as_the_template_writes_it():
    """An empty thought before it, as Qwen3's template has, and no end of turn, be it a special token or an added one."""
    tokenizer = letters()
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ '<t></t>' if m.role == 'assistant' }}{{ m.content }}<|end|></s>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = chat_examples(rows({"messages": [turn("user", "Hi"), turn("assistant", "Yo")]}), tokenizer, 500)
    kept = found[0].labels[found[0].labels != IGNORED]
    assert tokenizer.decode(kept) == "<t></t>Yo<|end|></s>"
    assert found[0].about["reference"] == "<t></t>Yo"


def test_of_a_conversation_in_several_examples_the_rows_are_counted_once():
    tokenizer = letters()
    tokenizer.chat_template = FORGETFUL
    messages = [turn("user", "Hi"), turn("assistant", "long"), turn("user", "?" * 60), turn("assistant", "last")]
    found = chat_examples(rows({"messages": messages}), tokenizer, 60)
    assert [learned(e) for e in found] == ["long<|im_end|>"]
    assert (found.rows, found.notes()) == (1, ["1 of 1 rows are longer than 60 tokens and were cut, first f, line 1"])
    found = chat_examples(rows({"messages": messages}), tokenizer, 20)
    assert (found.rows, len(found), found.dropped) == (1, 0, 1)


def test_turns_that_cannot_be_told_from_their_prompt_are_said():
    tokenizer = letters()
    # the prompt of the first answer begins a thought, which the answer's rendering lacks
    tokenizer.chat_template = FORGETFUL.replace("assistant\n{%", "assistant\n{{ '<think>' if messages|length < 2 }}{%")
    messages = [turn("user", "Hi"), turn("assistant", "a"), turn("user", "?"), turn("assistant", "b")]
    found = chat_examples(rows({"messages": messages}), tokenizer, 500)
    assert [learned(e) for e in found] == ["b<|im_end|>"]
    assert found.notes() == [
        "1 turns of the assistant cannot be told from their prompts in the chat template and are not learned, first f, line 1"
    ]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        ("{% for m in messages %}{{ m.content }}\n</s>{% endfor %}", ["</s>"]),
        ("{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n\n{% endfor %}", []),
        ("{{ raise_exception('a system prompt is needed') }}", []),
        (None, []),
    ],
)
def test_the_end_of_a_turn_is_the_templates(template, ends):
    tokenizer = letters()
    tokenizer.chat_template = template
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ends


def test_templates_that_cannot_be_used():
    messages = [turn("user", "Hi"), turn("assistant", "Yo")]
    with pytest.raises(ConfigError, match="has no chat template"):
        chat_examples(rows({"messages": messages}), letters(chat=False), 50)
    tokenizer = letters()
    tokenizer.chat_template = "{{ raise_exception('alternate!') }}"
    with pytest.raises(SourceError, match=r"f, line 1 has messages that the chat template refuses \(alternate!\)"):
        chat_examples(rows({"messages": messages}), tokenizer, 50)
    tokenizer.chat_template = "{% for m in messages|reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(SourceError, match="cannot be told from the prompt"):
        chat_examples(rows({"messages": messages}), tokenizer, 50)


def test_a_cut_conversation_is_measured_on_the_last_answer_that_is_left():
    messages = [turn("user", "a"), turn("assistant", "one"), turn("user", "b" * 60), turn("assistant", "two")]
    found = chat_examples(rows({"messages": messages}), letters(), 60)
    assert learned(found[0]) == "one<|im_end|>"
    assert (found[0].about["prompt"], found[0].about["reference"]) == (messages[:1], "one")
    before = letters().decode(found[0].input_ids[: found[0].about["prompt_tokens"]])
    assert before == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_a_greeting_of_the_assistant_is_context():
    messages = [turn("assistant", "Hello"), turn("user", "a"), turn("assistant", "b")]
    found = chat_examples(rows({"messages": messages}), letters(), 99)
    assert learned(found[0]) == "b<|im_end|>"
    with pytest.raises(SourceError, match="cannot be told from the prompt"):
        chat_examples(rows({"messages": messages[:1]}), letters(), 99)
