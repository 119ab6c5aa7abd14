"""What a client sees while a real server runs its prompts."""

import asyncio
import json
import struct
from collections import defaultdict

import aiohttp

TEXT, PREVIEW = 3, 1  # kinds of ComfyUI's binary messages


class Seen:
    """What a client sees of each node.

    Attributes:
        progress, texts, previews: {node: list of (value, maximum) | list of words | number of pictures}.
        ran: ids of the nodes that were executed.
    """

    def __init__(self):
        self.progress, self.texts, self.previews, self.ran = defaultdict(list), defaultdict(list), defaultdict(int), []


async def _listen(url, graphs):
    """Queue all graphs at once and listen until each has succeeded: {prompt id: Seen}."""
    found, current = {}, {}
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId=listener") as socket:
        for graph in graphs:
            body = {"prompt": graph, "client_id": "listener", "extra_data": {"preview_method": "latent2rgb"}}
            async with session.post(f"{url}/prompt", json=body) as answer:
                told = await answer.json()
                assert answer.status == 200, told
                found[told["prompt_id"]] = Seen()
        left, prompt = set(found), None
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                (kind,) = struct.unpack(">I", message.data[:4])
                if kind == TEXT:
                    (length,) = struct.unpack(">I", message.data[4:8])
                    name, words = message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()
                    found[prompt].texts[name].append(words)
                elif kind == PREVIEW:
                    assert message.data[8:10] == b"\xff\xd8"  # a JPEG
                    found[prompt].previews[current["node"]] += 1
            elif message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if kind == "executing" and data["node"] is not None:
                    prompt, current = data["prompt_id"], data
                    found[prompt].ran.append(data["node"])
                elif kind == "progress":
                    found[data["prompt_id"]].progress[data["node"]].append((data["value"], data["max"]))
                elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                    assert kind == "execution_success", event
                    left.discard(data["prompt_id"])
                    if not left:
                        break
    return found


def listen(client, *graphs):
    """Queue all graphs at once; for each its history entry and what was Seen.

    The entry is waited for: a server tells of a prompt's success a moment before its history has it.
    """
    found = asyncio.run(_listen(client.url, graphs))
    return [(client.wait(prompt), seen) for prompt, seen in found.items()]
