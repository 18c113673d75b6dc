"""The messages of the pipeline, grouped by receiver. Tensors travel beside them, never inside."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from epd.kv.handoff import KVHandoff
from epd.message_base import (
    Count,
    Life,
    Message,
    Name,
    Query,
    RequestMessage,
    Seconds,
    Text,
    TokenId,
)
from epd.pruning_spec import PruningSpec
from epd.request import MMItem, SamplingParams, TokenOutput
from epd.switch_messages import (
    MoveDecode,
    Returned,
    SwitchAbort,
    SwitchCommit,
    SwitchFailed,
    SwitchPhase,
    SwitchReady,
    SwitchRole,
)

__all__ = [
    "MESSAGES",
    "Adopted",
    "Cancel",
    "EncodeFailed",
    "EncodeRequest",
    "Encoded",
    "Evicted",
    "Heartbeat",
    "KVBlocks",
    "KVGone",
    "KVLayout",
    "KVOffer",
    "KVPull",
    "KVRelease",
    "KVRenew",
    "Leaving",
    "Message",
    "MissingItems",
    "MoveDecode",
    "PeerInfo",
    "Peers",
    "PrefillDone",
    "PrefillRequest",
    "RequestFailed",
    "RequestMessage",
    "Returned",
    "StepToken",
    "SwitchAbort",
    "SwitchCommit",
    "SwitchFailed",
    "SwitchPhase",
    "SwitchReady",
    "SwitchRole",
    "Tokens",
    "VisionTokens",
    "VisionTokensReceived",
    "WorkerStats",
]

# to every worker


class PeerInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a live worker listens and which stages it hosts, at which epoch of which process
    life.
    """

    worker_id: Name
    address: Name
    stages: str
    epoch: Count
    incarnation: Life


class Peers(Message, frozen=True, kw_only=True):
    """The live workers, sent by the gateway on every change and as its own heartbeat."""

    workers: list[PeerInfo]


class Cancel(RequestMessage, frozen=True, kw_only=True):
    """Forget every attempt up to this one and give back what it holds."""


# to a worker that encodes


class EncodeRequest(RequestMessage, frozen=True, kw_only=True):
    """Encode one image (buffer: uint8 [height, width, 3]) and send its tokens to `consumer`.

    With `pruning` only those that its method lets out of the encoder.
    """

    item: Count
    mm: MMItem
    consumer: Name
    ttl: Seconds
    pruning: PruningSpec | None = None


class VisionTokensReceived(RequestMessage, frozen=True, kw_only=True):
    """The consumer has the vision tokens of `item`; ends the transfer the encoder times."""

    item: Count


# to a worker that prefills


class PrefillRequest(RequestMessage, frozen=True, kw_only=True):
    """Prefill a prompt; `from_cache[i]` says that item i is in the token cache, not on its way.

    `pruning` chooses among the tokens of item i by `queries[i]`; `budget`, tokens per image, takes
    the place of its `keep` where that is possible.
    """

    prompt_token_ids: list[TokenId]
    items: list[MMItem]
    from_cache: list[bool]
    output_token_ids: list[TokenId]
    sampling: SamplingParams
    salt: Text
    consumer: Name
    ttl: Seconds
    pruning: PruningSpec | None = None
    queries: list[Query] = msgspec.field(default_factory=list)
    budget: Count | None = None


class VisionTokens(RequestMessage, frozen=True, kw_only=True):
    """The vision tokens of one image (buffers: [tokens, hidden], and what pruning needs)."""

    item: Count
    cache_key: Name


class KVPull(RequestMessage, frozen=True, kw_only=True):
    """The decode worker has room: send the KV."""


class KVRenew(Message, frozen=True, kw_only=True):
    """The decode worker still wants the KV of these requests: extend their leases."""

    request_ids: list[Name]


class KVRelease(RequestMessage, frozen=True, kw_only=True):
    """The decode worker has the KV (or no longer wants it): free the blocks."""


# to a worker that decodes


class KVOffer(RequestMessage, frozen=True, kw_only=True):
    """A prefilled request whose KV waits on the sender under a lease."""

    handoff: KVHandoff
    ttl: Seconds


class KVBlocks(RequestMessage, frozen=True, kw_only=True):
    """The KV of one request (buffers: one [2, tokens, kv_heads, head_dim] per layer)."""


class KVGone(RequestMessage, frozen=True, kw_only=True):
    """The pulled KV is no longer held."""


# to the gateway


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker reports about itself with every heartbeat."""

    encode_queue: Count = 0
    encoded_total: Count = 0
    prefill_waiting: Count = 0
    running: Count = 0
    handoff_queue: Count = 0
    kv_leases: Count = 0
    blocks_total: Count = 0
    blocks_free: Count = 0
    prefix_queries: Count = 0
    prefix_hits: Count = 0
    cache_queries: Count = 0
    cache_hits: Count = 0
    cache_errors: Count = 0
    preemptions: Count = 0
    handoff_bytes: Count = 0
    frames_rejected: Count = 0
    resident_bytes: Count = 0
    kv_fallbacks: Count = 0


class KVLayout(msgspec.Struct, frozen=True, array_like=True):
    """How each layer holds its KV, and its layer group: the same wherever KV goes."""

    formats: Annotated[list[Name], Meta(max_length=1024)]
    groups: Annotated[list[Count], Meta(max_length=1024)]


class Heartbeat(Message, frozen=True, kw_only=True):
    """A worker is alive. `revision` names the model it serves, `encoder_revision` its vision side,
    `kv` how it holds KV, if it does.

    A worker that is not `accepting` finishes what it has; `switch_id` names a switch under way.
    """

    address: Name
    revision: Name
    encoder_revision: Name
    dtype: Name
    kv: KVLayout | None = None
    accepting: bool = True
    switch_id: Name | None = None
    stats: WorkerStats


class Leaving(Message, frozen=True, kw_only=True):
    """The worker is done and ends now."""


class Encoded(RequestMessage, frozen=True, kw_only=True):
    """An image was encoded (or found) and handed over; durations on the encoder's clock."""

    item: Count
    cached: bool
    queue_seconds: Seconds
    encode_seconds: Seconds
    transfer_seconds: Seconds


class EncodeFailed(RequestMessage, frozen=True, kw_only=True):
    """An image could not be encoded; `code` names the error type, `param` the request's field."""

    item: Count
    code: Name
    message: Text
    param: Text | None = None


class MissingItems(RequestMessage, frozen=True, kw_only=True):
    """The prefill worker lacks the vision tokens of these items: have them encoded."""

    items: list[Count]


class PrefillDone(RequestMessage, frozen=True, kw_only=True):
    """The prompt is prefilled; counts after expansion of the image placeholders."""

    prompt_tokens: Count
    image_tokens: Count
    image_tokens_before: Count = 0
    cached_tokens: Count
    queue_seconds: Seconds
    prefill_seconds: Seconds


class Adopted(RequestMessage, frozen=True, kw_only=True):
    """The decode worker holds the KV; the prefill worker is no longer needed."""

    transfer_seconds: Seconds
    transfer_bytes: Count


class StepToken(msgspec.Struct, frozen=True, array_like=True):
    """One token of one request in a step; `finish_reason` is set on the last."""

    request_id: Name
    attempt: Count
    output: TokenOutput
    finish_reason: str | None = None


class Tokens(Message, frozen=True, kw_only=True):
    """Everything one step sampled: one message a step, whatever the batch."""

    tokens: list[StepToken]


class Evicted(RequestMessage, frozen=True, kw_only=True):
    """The request lost its KV to a fuller queue and cannot be recomputed here."""


class RequestFailed(RequestMessage, frozen=True, kw_only=True):
    """The worker gave the request up; `retryable` when another worker might succeed."""

    code: Name
    message: Text
    retryable: bool
    param: Text | None = None


MESSAGES: dict[bytes, type[Message]] = {
    cls.__name__.encode(): cls
    for cls in (
        Peers, Cancel, EncodeRequest, VisionTokensReceived, PrefillRequest, VisionTokens, KVPull,
        KVRenew, KVRelease, KVOffer, KVBlocks, KVGone, Heartbeat, Leaving, Encoded, EncodeFailed,
        MissingItems, PrefillDone, Adopted, Tokens, Evicted, RequestFailed,
        SwitchRole, SwitchCommit, SwitchAbort, MoveDecode, Returned, SwitchPhase, SwitchReady,
        SwitchFailed,
    )
}  # fmt: skip
