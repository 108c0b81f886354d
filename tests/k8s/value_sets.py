"""Values that the chart is rendered with: what each is for, by name."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

SECRET: Values = {"secret": {"existingSecret": "afd-secret"}}

RDMA_RACK: Values = {
    **SECRET,
    "topology": "2A2F",
    "streams": 3,
    "device": "cuda",
    "model": {"name": "/models/step3", "volume": {"pvc": {"claimName": "models"}}},
    "image": {"repository": "registry.example/afd", "tag": "0.1.0-cuda"},
    "gpu": {"count": 8},
    "rdma": {"enabled": True, "count": 8, "env": [{"name": "NCCL_IB_HCA", "value": "mlx5_0"}]},
    "hostNetwork": True,
    "networkPolicy": {"enabled": False},
    "placement": {"topologyKey": "topology.kubernetes.io/rack"},
    "attention": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]},
    "ffn": {"nodeSelector": {"accelerator": "h800"}},
}

EVERYTHING: Values = {
    **SECRET,
    "topology": "3A2F",
    "model": {"name": "/models/m", "volume": {"hostPath": {"path": "/data/models"}}},
    "apiKeys": True,
    "tls": {"enabled": True, "secretName": "afd-tls"},
    "config": {"attention": {"block_size": 32, "prefix_cache": False}, "gateway": {"max_queue": 64}},
    "imagePullSecrets": [{"name": "registry"}],
    "gateway": {
        "replicas": 3,
        "service": {"type": "LoadBalancer", "annotations": {"example.com/internal": "true"}},
        "ingress": {"enabled": True, "host": "llm.example.com", "className": "nginx", "tlsSecretName": "llm-tls"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "edge"}], "hostnames": ["llm.example.com"]},
        "podAnnotations": {"example.com/team": "serving"},
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 1,
                        "podAffinityTerm": {
                            "topologyKey": "kubernetes.io/hostname",
                            "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "gateway"}},
                        },
                    }
                ]
            }
        },
    },
    "attention": {
        "hpa": {"enabled": True, "maxReplicas": 8},
        "env": [{"name": "TOKENIZERS_PARALLELISM", "value": "0"}],
    },
    "networkPolicy": {
        "clientsFrom": [{"namespaceSelector": {"matchLabels": {"name": "apps"}}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
    },
    "monitoring": {"serviceMonitor": True, "prometheusRule": True, "dashboard": True, "labels": {"release": "prom"}},
    "autoscale": {"enabled": True},
}

VALUE_SETS: dict[str, Values] = {
    "defaults": {},
    "1a1f": SECRET,
    "2a2f": {**SECRET, "topology": "2A2F", "streams": 2},
    "2a2f-sparse": {**SECRET, "topology": "2A2F", "transport": "verbs", "ffnParallel": "ep", "dispatch": "sparse"},
    "16a2f": {**SECRET, "topology": "16A2F", "gateway": {"replicas": 4}},
    "1a16f": {**SECRET, "topology": "1A16F", "ffnParallel": "tp"},
    "128a99f": {**SECRET, "topology": "128A99F"},
    "rdma-rack": RDMA_RACK,
    "everything": EVERYTHING,
    "tls": {**SECRET, "topology": "2A1F", "tls": {"enabled": True, "secretName": "afd-tls"}},
    "model-image": {
        **SECRET,
        "model": {"name": "/models/m", "volume": {"image": {"reference": "registry.example/models/m:1.0"}}},
    },
    "closed-in": {**SECRET, "networkPolicy": {"egress": False}, "podDisruptionBudgets": False},
    "autoscale-apply": {**SECRET, "autoscale": {"enabled": True, "mode": "apply", "max": "6A1F"}},
    "disaggregatedset": {**SECRET, "shape": "disaggregatedset", "topology": "2A2F"},
    "disaggregatedset-rack": {**RDMA_RACK, "shape": "disaggregatedset", "topology": "16A2F"},
    "disaggregatedset-everything": {**EVERYTHING, "shape": "disaggregatedset"},
    "disaggregatedset-apply": {
        **SECRET,
        "shape": "disaggregatedset",
        "topology": "2A1F",
        "autoscale": {"enabled": True, "mode": "apply", "min": "2A1F", "max": "6A1F"},
    },
}

REFUSED: dict[str, tuple[Values, str]] = {
    "no FFN": ({"topology": "2A"}, "does not match pattern"),
    "zero": ({"topology": "0A1F"}, "does not match pattern"),
    "too many": ({"topology": "129A1F"}, "does not match pattern"),
    "mono": ({"topology": "mono"}, "does not match pattern"),
    "streams": ({"streams": 5}, "maximum: got 5, want 4"),
    "typo": ({"topolgy": "1A1F"}, "additional properties 'topolgy' not allowed"),
    "typo below": ({"attention": {"kvCacheGib": 4}}, "additional properties 'kvCacheGib' not allowed"),
    "latest": ({"image": {"tag": "latest"}}, "/image/tag"),
    "latest model": ({"model": {"volume": {"image": {"reference": "a/b:latest"}}}}, "/model/volume/image/reference"),
    "two volumes": (
        {"model": {"volume": {"pvc": {"claimName": "a"}, "hostPath": {"path": "/b"}}}},
        "/model/volume",
    ),
    "no volume": ({"model": {"name": "/models/a"}}, "model.volume says where the files come from"),
    "no limits": ({"ffn": {"resources": {"limits": None}}}, "limits"),
    "set twice": ({"config": {"gateway": {"port": 1}}}, "config.gateway.port is already set"),
    "unknown section": ({"config": {"gatway": {"max_queue": 1}}}, "gatway"),
    "host network": ({"hostNetwork": True}, "set networkPolicy.enabled to false"),
    "sparse tp": ({"dispatch": "sparse", "ffnParallel": "tp"}, "leaves out no row with ffnParallel tp"),
    "tls": ({"tls": {"enabled": True}}, "tls.enabled needs tls.secretName"),
    "api keys": ({"apiKeys": True}, "apiKeys needs secret.existingSecret"),
    "ingress": ({"gateway": {"ingress": {"enabled": True}}}, "needs gateway.ingress.host"),
    "route": ({"gateway": {"httpRoute": {"enabled": True}}}, "needs gateway.httpRoute.parentRefs"),
    "hpa": ({"topology": "8A1F", "attention": {"hpa": {"enabled": True}}}, "maxReplicas is below topology 8A1F"),
    "below": (
        {"topology": "2A1F", "autoscale": {"enabled": True, "mode": "apply"}},
        "autoscale.min 1A1F is below topology 2A1F",
    ),
    "two scalers": (
        {"attention": {"hpa": {"enabled": True}}, "autoscale": {"enabled": True, "mode": "apply"}},
        "enable one",
    ),
}
