"""Makes a pair of a link by carrying out the handshake. `Dialling` is the attention rank's end, `Visit` the FFN rank's.

Both are attempts with a deadline: `advance` reads what has come and returns the pair once it is up; it raises a
MeshError when the attempt has failed, after which `abandon` frees everything. Main thread only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from stepmesh.config import MeshConfig
from stepmesh.errors import HandshakeError, TransportError
from stepmesh.handshake import (
    Accepted,
    Attached,
    Established,
    Hello,
    Initiator,
    Proven,
    Reply,
    Responder,
    Step,
)
from stepmesh.pair import AttentionPair, Environment, FfnPair, Identity
from stepmesh.stats import PeerStats
from stepmesh.topology import Choice, Epochs, Refusal, choose_transport, geometry
from stepmesh.transports.base import Channel, ChannelSpec, Link, close_fds
from stepmesh.types import Member, RankId
from stepmesh.wire import NONCE_BYTES, ControlFrame


class _Attempt(ABC):
    """What both ends share: reading frames, the channel under construction, the deadline."""

    def __init__(self, env: Environment, link: Link, handshake: Initiator | Responder) -> None:
        self._env = env
        self.link = link
        self._handshake = handshake
        self._channel: Channel | None = None
        self._reason = ""
        self.leftover: list[ControlFrame] = []  # frames that came right behind the handshake: the pair's
        self.deadline = env.fabric.now() + env.config.connect_timeout_s

    @property
    def authenticated(self) -> bool:
        return self._handshake.authenticated

    @property
    def accepted(self) -> bool:
        """The responder has agreed: this attempt's generation is used up, whatever happens next."""
        return self._channel is not None

    @property
    def transport(self) -> str:
        """What both ends have agreed on; "" until then."""
        return self._channel.kind if self._channel is not None else ""

    @property
    def broken(self) -> bool:
        """The channel failed before the pair was up; that does not show on the link."""
        return self._channel is not None and self._channel.failure is not None

    def abandon(self) -> None:
        """Close link and channel, and what came behind the handshake."""
        for frame in self.leftover:
            close_fds(frame.fds)
        self.leftover = []
        self.link.close()
        if self._channel is not None:
            self._channel.close()

    def _read(self) -> None:
        received, closed = self.link.receive()
        frames = deque(received)
        try:
            while frames and not self._handshake.done:
                step = self._handshake.receive(frames[0])
                fds = frames.popleft().fds
                if self._handshake.authenticated:
                    self.link.trust()
                if not isinstance(step, Accepted | Attached):
                    close_fds(fds)
                self._carry_out(step)
            self.leftover = [*frames] if self._handshake.done else []
        except BaseException:
            for frame in frames:
                close_fds(frame.fds)
            raise
        if closed is not None:
            raise HandshakeError(self._explain(closed))
        if self._channel is not None and (failure := self._channel.failure) is not None:
            raise TransportError(failure.reason)
        if self._env.fabric.now() > self.deadline:
            raise HandshakeError(f"no answer within {self._env.config.connect_timeout_s:g} s")

    def _explain(self, closed: str) -> str:
        if self.authenticated or "peer closed" not in closed:
            return closed
        return f"{closed} during the handshake (another cluster secret?)"

    @abstractmethod
    def _carry_out(self, step: Step) -> None:
        """Do what a step of the handshake asks for."""

    def _open_channel(self, transport: str, peer: RankId, generation: int) -> Channel:
        config = self._env.config
        spec = ChannelSpec(
            name=f"{config.id} - {peer} generation {generation}",
            num_streams=config.num_streams,
            rx_slot_bytes=config.rx_slot_bytes,
            tx_slot_bytes=config.tx_slot_bytes,
            session_secret=self._handshake.session_key,
        )
        self._channel = self._env.fabric.open_channel(transport, spec, self.link)
        return self._channel


class Dialling(_Attempt):
    """The attention rank shakes hands with one member over a link that it has begun to open."""

    def __init__(
        self, env: Environment, link: Link, member: Member, generation: int, stats: PeerStats, withheld: str = ""
    ) -> None:
        config = env.config
        self.member = member
        self.generation = generation
        self._stats = stats
        self._pair: AttentionPair | None = None
        transports = tuple(name for name in env.fabric.transports if not withheld.startswith(f"{name}:"))
        hello = _hello(config, transports, member, generation, withheld)
        handshake = Initiator(config.secret, env.fabric.nonce(NONCE_BYTES), hello)
        super().__init__(env, link, handshake)
        self.link.send(handshake.start())

    def advance(self) -> AttentionPair | None:
        self._read()
        if self._pair is not None:
            self._pair.leftover = self.leftover
        return self._pair

    def _carry_out(self, step: Step) -> None:
        assert isinstance(self._handshake, Initiator)
        if isinstance(step, Reply):
            self.link.send(step.frame)
        elif isinstance(step, Accepted):
            self._reason = step.reason
            try:
                channel = self._open_channel(step.transport, self.member.id, self.generation)
            except BaseException:
                close_fds(step.fds)
                raise
            offer = channel.offer()
            self.link.send(self._handshake.attach(offer.descriptor, len(offer.fds)), offer.fds)
            channel.attach(step.descriptor, step.fds)
        elif isinstance(step, Established):
            assert self._channel is not None
            identity = Identity(self.member.id, self.member.incarnation, self.generation, self._reason)
            self._pair = AttentionPair(self._env, identity, self.link, self._channel, self._stats)


class Visit(_Attempt):
    """Somebody has connected to this FFN rank. `decide` judges an authenticated hello."""

    def __init__(
        self,
        env: Environment,
        link: Link,
        epochs: Epochs,
        decide: Callable[[Hello], Refusal | None],
        stats_of: Callable[[RankId], PeerStats],
    ) -> None:
        super().__init__(env, link, Responder(env.config.secret, env.fabric.nonce(NONCE_BYTES)))
        self._epochs = epochs
        self._decide = decide
        self._stats_of = stats_of
        self._attached = False
        self.hello: Hello | None = None

    @property
    def awaits_channel(self) -> bool:
        """Whether only the channel's other half is missing, whose coming does not show on the link."""
        return self._attached

    def advance(self) -> FfnPair | None:
        self._read()
        if self.leftover:
            raise HandshakeError("the peer went on before it heard READY")
        if not self._attached or self._channel is None or not self._channel.ready:
            return None
        assert isinstance(self._handshake, Responder) and self.hello is not None
        self.link.send(self._handshake.ready())
        hello = self.hello
        identity = Identity(hello.id, hello.incarnation, hello.generation, self._reason)
        stats = self._stats_of(hello.id)
        epochs = self._epochs.of(hello.id, hello.incarnation)
        return FfnPair(self._env, identity, self.link, self._channel, stats, epochs)

    def _carry_out(self, step: Step) -> None:
        assert isinstance(self._handshake, Responder)
        if isinstance(step, Reply):
            self.link.send(step.frame)
        elif isinstance(step, Proven):
            self.hello = step.hello
            self._answer(self._handshake, step.hello)
        elif isinstance(step, Attached):
            assert self._channel is not None
            self._channel.attach(step.descriptor, step.fds)
            self._attached = True

    def _answer(self, handshake: Responder, hello: Hello) -> None:
        verdict: Refusal | Choice | None = self._decide(hello)
        if verdict is None:
            verdict = choose_transport(hello.transports, self._env.fabric.transports, self.link.kind, hello.withheld)
        if isinstance(verdict, Refusal):
            self.link.send(handshake.reject(verdict.reason, retryable=verdict.retryable))
            raise HandshakeError(verdict.reason, retryable=verdict.retryable)
        self._reason = verdict.reason
        offer = self._open_channel(verdict.transport, hello.id, hello.generation).offer()
        self.link.send(handshake.accept(verdict.transport, verdict.reason, offer.descriptor, len(offer.fds)), offer.fds)


def _hello(config: MeshConfig, transports: tuple[str, ...], member: Member, generation: int, withheld: str) -> Hello:
    return Hello(
        id=config.id,
        incarnation=config.incarnation,
        config_hash=config.config_hash.hex(),
        geometry=geometry(config),
        transports=transports,
        generation=generation,
        target=member.id,
        target_incarnation=member.incarnation,
        withheld=withheld,
    )
