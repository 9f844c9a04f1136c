"""The three dialects that clients speak: chat completions, Anthropic's messages, OpenAI's responses.

Each module reads its dialect's requests, words its answers, streams and errors, and says how a request of its own
is a chat completion, which is what the classifier reads and what goes to providers of another dialect.
"""

from router.dialects.chat import CHAT
from router.dialects.inbound import Dialect, Inbound, View, Writer
from router.dialects.messages import MESSAGES
from router.dialects.responses import RESPONSES

__all__ = ["CHAT", "DIALECTS", "MESSAGES", "RESPONSES", "Dialect", "Inbound", "View", "Writer"]

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (CHAT, MESSAGES, RESPONSES)}
