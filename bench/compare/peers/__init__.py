"""The engines that AFD is compared with."""

from bench.compare.peers.llama_cpp import LlamaCpp
from bench.compare.peers.peer import Peer
from bench.compare.peers.transformers import Transformers
from bench.compare.peers.vllm import Vllm

PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Vllm, Transformers, LlamaCpp)}
