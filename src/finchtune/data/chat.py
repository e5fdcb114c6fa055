"""The messages of a chat, in the forms that data sets have -> one form, nothing left out."""

import json
from contextlib import suppress
from typing import Any

from finchtune.data.values import BadRecord, kind, text_of

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"),
    "tool": ("tool", "function", "ipython", "observation"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
TRAIN_KEYS = ("weight", "train")
# They hold text, pictures or masks that no template has a place for.
REFUSED_KEYS = (
    *("reasoning_content", "reasoning", "thinking", "refusal", "audio", "image", "images"),
    *("train_detail", "training_detail", "weights"),
)
REFUSED_BESIDE = ("tools", "functions")


def messages_of(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The chat in a record's field as messages with `role`, `content` and maybe `trained`.

    `role` is system, user, assistant or tool. A `system` text beside the chat becomes its first
    message. BadRecord for whatever would be left out.
    """
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise BadRecord(f"the field {key!r} must be a list of messages, but it is {kind(messages)}")
    for beside in REFUSED_BESIDE:
        if record.get(beside):
            raise BadRecord(
                f"the field {beside!r} beside {key!r} would be left out; write it into a system "
                "message, or drop it"
            )
    system = record.get("system")
    found = [{"role": "system", "content": text_of(record, "system")}] if system else []
    for i, message in enumerate(messages):
        try:
            found.append(_message(message))
        except BadRecord as error:
            raise BadRecord(f"{key}[{i}]{error}") from None
    return found


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRecord(f" must be an object, but it is {kind(message)}")
    try:
        role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
        name = text_of(message, role_key)
        if name.lower() not in ROLE_OF:
            raise BadRecord(f"the role {name!r} is none of {', '.join(ROLE_OF)}")
        for key in REFUSED_KEYS:
            if message.get(key):
                raise BadRecord(f"the field {key!r} would be left out; drop it, or put its text "
                    "into the content")  # fmt: skip
        found: dict[str, Any] = {"role": ROLE_OF[name.lower()]}
        found["content"] = _content(message, content_key)
        found |= _trained(message)
    except BadRecord as error:
        raise BadRecord(f": {error}") from None
    return found


def _content(message: dict[str, Any], key: str) -> str:
    """What is said, and the calls of tools as `<tool_call>` lines behind it."""
    content, calls = message.get(key), _calls(message)
    if isinstance(content, list):
        said = "".join(_part(part, i, key) for i, part in enumerate(content))
    elif content is None and calls:
        said = ""
    else:
        said = text_of(message, key)
    return "\n".join([*([said] if said or not calls else []), *calls])


def _part(part: Any, i: int, key: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRecord(f"{key}[{i}] must be a text part, but it is {kind(part)}")
    if part.get("type", "text") != "text":
        raise BadRecord(f"{key}[{i}] is of the type {part['type']!r}; only text can be trained on")
    try:
        return text_of(part, "text")
    except BadRecord as error:
        raise BadRecord(f"{key}[{i}]: {error}") from None


def _calls(message: dict[str, Any]) -> list[str]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRecord(f"'tool_calls' must be a list, but it is {kind(calls)}")
    functions = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    if message.get("function_call"):
        functions.append(message["function_call"])
    return [_call(function) for function in functions]


def _call(function: Any) -> str:
    """One call as the line that many chat models write: {"name": ..., "arguments": ...} in tags."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord("a tool call must be an object with the 'name' of a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError):  # a text that is no JSON stays a text
            arguments = json.loads(arguments)
    call = {"name": function["name"], "arguments": arguments}
    return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"


def _trained(message: dict[str, Any]) -> dict[str, bool]:
    """`weight` (OpenAI) or `train` (axolotl), if the message has one that is not null."""
    given = {key: message[key] for key in TRAIN_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # False and True too
            raise BadRecord(f"{key!r} must be 0 or 1, not {value!r}; no other weight is known")
    if len(set(map(bool, given.values()))) > 1:
        raise BadRecord("'weight' and 'train' contradict each other")
    return {"trained": any(given.values())} if given else {}
