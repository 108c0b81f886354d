"""A `CoordinatorState` with scripted workers, as the world of a scenario."""

from __future__ import annotations

from tests.unit.coordinator.scenario import Scenario


class CoordinatorWorld:
    """A process is called by its incarnation: a0, a1, ... of attention workers, f0, f1, ... of FFN workers.

    `+0.5s ...` is what the coordinator logs. The other line is the view that it publishes, when that has changed:
    `attention/1=a0` says that process a0 has attention rank 1.
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._scenario = Scenario()
        self._num_events = 0
        self._view = ""

    # -- commands -----------------------------------------------------------------------------------------

    def cluster(self, topology: str, standby: str = "0") -> None:
        """The coordinator of such a cluster starts. standby: FFN workers that are to wait."""
        self._scenario = Scenario(topology, num_standby=int(standby))
        self._num_events, self._view = 0, ""

    def register(self, *names: str) -> None:
        for name in names:
            reply = self._scenario.register(name)
            if reply.error:
                self._said.append(f"{name} is refused: {reply.error}")

    def start(self, *names: str) -> None:
        """They register, and cannot be reached yet: they load, or are on standby."""
        for name in names:
            reply = self._scenario.register(name, bound=False)
            self._said.append(f"{name} is refused: {reply.error}" if reply.error else f"{name} has rank {reply.rank}")

    def ended(self, name: str) -> None:
        """Whoever started the process saw its end."""
        self._scenario.state.ended(name, "killed by SIGKILL", self._scenario.now)
        self._scenario.silent.add(name)

    def ready(self, *names: str) -> None:
        """The workers have loaded, and reach whom they need."""
        for name in names:
            self._scenario.sync(name, ready=True)

    def unready(self, *names: str) -> None:
        for name in names:
            self._scenario.sync(name, ready=False)

    def wait(self, seconds: str) -> None:
        """Time passes; whoever is not silent sends heartbeats."""
        self._scenario.wait(float(seconds))

    def silent(self, name: str) -> None:
        """The process sends no heartbeat from now on."""
        self._scenario.silent.add(name)

    def gone(self, name: str) -> None:
        """The process has left: it said so."""
        self._scenario.sync(name, leaving=True)
        self._scenario.infos.pop(name)

    def broken(self, name: str, *peers: str) -> None:
        """The worker says that its links to these peers are broken, and only these."""
        self._scenario.report(name, *peers)

    def stalled(self, name: str) -> None:
        """The worker's main loop stands still with work pending."""
        self._scenario.sync(name, progress=7, pending=True)

    def heartbeat(self, name: str) -> None:
        """The worker says that it lives, and hears what the coordinator thinks of that."""
        reply = self._scenario.sync(name)
        self._said.append(f"{name} hears: {reply.reason if reply.lost else 'ok'}")

    def ask(self, action: str, target: str = "") -> None:
        """`afd` asks for something: drain, shutdown."""
        reply = self._scenario.control(action, target)
        self._said.append(f"{action} {target}: {reply.error or 'ok'}")

    def restart(self, away: str = "0") -> None:
        """The coordinator's successor remembers nothing; workers that are not silent register again."""
        self._scenario.restart_coordinator(away_s=float(away))
        self._num_events = 0
        for name in list(self._scenario.infos):
            if name not in self._scenario.silent:
                self._scenario.register(name, again=True)

    # -- what comes of it ---------------------------------------------------------------------------------

    def news(self) -> list[str]:
        scenario = self._scenario
        events = scenario.state.status(scenario.now).events
        lines, self._said = self._said, []
        lines += [event.removesuffix(" from host (pid 1)") for event in events[self._num_events :]]
        self._num_events = len(events)
        view = scenario.view
        members = [
            f"{m.info.role}/{m.rank}={m.info.incarnation}{'' if m.ready else ' not ready'}{' draining' * m.draining}"
            for role in ("attention", "ffn")
            for m in view.of_role(role)
        ]
        members += [
            f"{m.info.incarnation} {'is to be ffn/' + str(m.rank) if m.rank < view.num_ffn else 'on standby'}"
            for m in view.standbys
        ]
        text = f"epoch {view.epoch}{'' if view.formed else ', not formed'}: {', '.join(members) or 'nobody'}"
        if text != self._view:
            self._view = text
            lines.append(text)
        return lines
