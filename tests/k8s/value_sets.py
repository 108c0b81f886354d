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
    "rdma": {"enabled": True, "env": [{"name": "NCCL_IB_HCA", "value": "mlx5_0"}]},
    "hostNetwork": True,
    "networkPolicy": {"enabled": False},
    "placement": {"topologyKey": "topology.kubernetes.io/rack"},
    "attention": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]},
    "ffn": {"nodeSelector": {"accelerator": "h800"}},
}

# What platform teams ask of every pod, once for all and once for one role.
POD_EXTRAS: Values = {
    **SECRET,
    "topology": "2A1F",
    "queueName": "gpus",
    "serviceAccount": {"annotations": {"example.com/role": "reader"}},
    "pods": {
        "podLabels": {"team": "serving"},
        "priorityClassName": "high",
        "schedulerName": "gang",
        "runtimeClassName": "nvidia",
        "tolerations": [{"key": "pool", "operator": "Exists"}],
        "extraVolumes": [{"name": "hugepages", "emptyDir": {"medium": "HugePages"}}],
        "extraVolumeMounts": [{"name": "hugepages", "mountPath": "/hugepages"}],
        "affinity": {
            "podAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "cache"}}}
                ]
            }
        },
    },
    "placement": {"topologyKey": "rack"},
    "attention": {
        "device": "cuda",
        "gpu": {"count": 0},
        "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}],
        "image": {"tag": "0.1.0-cuda-special"},
        "shmSizeLimit": "4Gi",
        "podLabels": {"tier": "attention"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "priorityClassName": "highest",
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"tier": "attention"}},
            }
        ],
        "extraVolumes": [{"name": "jit", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "jit", "mountPath": "/cache"}],
        "extraContainers": [
            {
                "name": "logs",
                "image": "registry.example/logs:1",
                "resources": {"requests": {"cpu": "1m", "memory": "1Mi"}, "limits": {"memory": "1Mi"}},
            }
        ],
        "lifecycle": {"postStart": {"exec": {"command": ["/bin/true"]}}},
        "terminationGracePeriodSeconds": 90,
        "deadNodeSeconds": 60,
        "updateStrategy": {"type": "OnDelete"},
        "podDisruptionBudget": {"minAvailable": 1},
        "probes": {"startupSeconds": 3600, "livenessFailures": 9},
        "keda": {"enabled": True, "maxReplicas": 8, "serverAddress": "http://prometheus.monitoring:9090"},
    },
    "gateway": {
        "hpa": {"enabled": True},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "edge"}]},
        "inferencePool": {"enabled": True, "endpointPicker": "afd-epp"},
    },
}

# Of a cluster that has its own ways: addresses, users, load balancers, a bucket as a volume, images by digest.
PLATFORM: Values = {
    **SECRET,
    "ipFamily": "IPv6",
    "securityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
    "image": {"repository": "registry.corp.example:5000/llm/afd", "tag": "0.1.0@sha256:" + 64 * "a"},
    "imagePullSecrets": [{"name": "registry"}],
    "model": {
        "name": "/models/m",
        "volume": {"csi": {"driver": "bucket.example", "volumeAttributes": {"b": "m"}}},
    },
    "pods": {
        "podAnnotations": {"sidecar.istio.io/inject": "false"},
        "env": [{"name": "LEVEL", "value": "all"}, {"name": "ZONE", "value": "a"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
        ],
    },
    "ffn": {
        "env": [{"name": "LEVEL", "value": "ffn"}],
        "topologySpreadConstraints": [
            {"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
        ],
    },
    "gateway": {
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sleep", "9"]}}},
        "service": {
            "type": "LoadBalancer",
            "nodePort": 30080,
            "spec": {"loadBalancerClass": "example.com/lb", "ipFamilyPolicy": "PreferDualStack"},
        },
    },
    "autoscale": {"enabled": True},
}

DOWNLOAD: Values = {
    **SECRET,
    "model": {
        "name": "/models/m",
        "volume": {"pvc": {"claimName": "models"}},
        "download": {
            "image": "registry.example/fetch:1",
            "args": ["m", "/models/m"],
            "env": [{"name": "T", "value": "x"}],
        },
    },
    "networkPolicy": {"egressTo": [{"ports": [{"protocol": "TCP", "port": 443}]}]},
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
    "2a2f-sparse": {
        **SECRET,
        "topology": "2A2F",
        "transport": "verbs",
        "rdma": {"enabled": True},
        "ffnParallel": "ep",
        "dispatch": "sparse",
    },
    "16a2f": {**SECRET, "topology": "16A2F", "gateway": {"replicas": 4}},
    "1a16f": {**SECRET, "topology": "1A16F", "ffnParallel": "tp"},
    "128a99f": {**SECRET, "topology": "128A99F"},
    "rdma-rack": RDMA_RACK,
    "everything": EVERYTHING,
    "pod-extras": POD_EXTRAS,
    "platform": PLATFORM,
    "download": DOWNLOAD,
    "attention-on-gpus": {**SECRET, "attention": {"device": "cuda"}, "topology": "1A2F"},
    "shared-memory": {**SECRET, "transport": "shm", "hostNetwork": True, "networkPolicy": {"enabled": False}},
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
    "8 GPUs, one used": ({"device": "cuda", "gpu": {"count": 8}}, "/gpu/count"),
    "shm alone": ({"transport": "shm"}, "transport shm needs hostNetwork for attention and ffn"),
    "shm half": (
        {"transport": "shm", "ffn": {"hostNetwork": True}, "networkPolicy": {"enabled": False}},
        "transport shm needs hostNetwork for attention and ffn",
    ),
    "verbs": ({"transport": "verbs"}, "transport verbs needs rdma.enabled"),
    "host network of a role": ({"ffn": {"hostNetwork": True}}, "set networkPolicy.enabled to false"),
    "above": ({"topology": "16A2F", "autoscale": {"enabled": True}}, "autoscale.max 8A4F is below topology 16A2F"),
    "FFN above": ({"topology": "1A5F", "autoscale": {"enabled": True}}, "autoscale.max 8A4F is below topology 1A5F"),
    "more FFN": ({"autoscale": {"enabled": True, "min": "1A2F"}}, "whose number of FFN workers stays"),
    "min over max": (
        {"autoscale": {"enabled": True, "min": "16A4F"}},
        "autoscale.min 16A4F exceeds autoscale.max 8A4F",
    ),
    "KV cache": ({"attention": {"kvCacheGiB": 50}}, "attention.kvCacheGiB 50 does not fit the memory limit"),
    "unknown key": ({"config": {"attention": {"nonsense": 1}}}, "additional properties 'nonsense' not allowed"),
    "key of another type": ({"config": {"gateway": {"max_queue": "many"}}}, "/config/gateway/max_queue"),
    "key out of range": ({"config": {"attention": {"block_size": 7}}}, "/config/attention/block_size"),
    "unknown model": ({"model": {"name": "step3"}}, "/model/name"),
    "unknown preset": ({"model": {"name": "dummy:nothing"}}, "/model/name"),
    "model elsewhere": ({"model": {"name": "/data/m"}}, "model.name /data/m is not under model.mountPath /models"),
    "empty model": (
        {"model": {"name": "/models/m", "volume": {"emptyDir": {"sizeLimit": "1Gi"}}}},
        "model.download says what fills it",
    ),
    "download to nowhere": ({"model": {"download": {"image": "a/b:1"}}}, "model.download needs a model.volume"),
    "download shut in": (
        {**DOWNLOAD, "networkPolicy": {"egressTo": []}},
        "model.download needs a way out of the pods",
    ),
    "metrics shut out": (
        {"networkPolicy": {"clientsFrom": [{"podSelector": {}}], "metricsFrom": []}},
        "name who scrapes them in networkPolicy.metricsFrom",
    ),
    "KEDA": ({"attention": {"keda": {"enabled": True}}}, "needs attention.keda.serverAddress"),
    "pool": ({"gateway": {"inferencePool": {"enabled": True}}}, "needs gateway.inferencePool.endpointPicker"),
    "gateways": ({"gateway": {"replicas": 9, "hpa": {"enabled": True}}}, "gateway.hpa.maxReplicas is below"),
    "claim of nothing": ({"attention": {"resourceClaims": [{"name": "gpu"}]}}, "/attention/resourceClaims/0"),
    "a volume of the chart's": (
        {"pods": {"extraVolumes": [{"name": "scratch", "emptyDir": {}}]}},
        "there are two of scratch; some are the chart's own: config, secret, scratch",
    ),
    "a mount of nothing": (
        {"ffn": {"extraVolumeMounts": [{"name": "cache", "mountPath": "/c"}]}},
        "ffn.extraVolumeMounts: no volume is called cache",
    ),
    "a variable of the chart's": (
        {"attention": {"env": [{"name": "POD_IP", "value": "::1"}]}},
        "attention.env (with pods.env): there are two of POD_IP",
    ),
    "a container twice": (
        {"ffn": {"extraContainers": [{"name": "a", "image": "a:1"}, {"name": "a", "image": "b:1"}]}},
        "ffn.extraContainers (with pods.extraContainers): there are two of a",
    ),
    "request above limit": (
        {"ffn": {"resources": {"requests": {"cpu": "4500m"}}}},
        "ffn.resources: the request of cpu, 4500m, is above the limit, 4",
    ),
    "strategy": ({"ffn": {"updateStrategy": {"type": "Recreate"}}}, "/ffn/updateStrategy/type"),
    "selector of the Service": (
        {"gateway": {"service": {"spec": {"selector": {}}}}},
        "invalid propertyName 'selector'",
    ),
    "two scalers": (
        {"attention": {"hpa": {"enabled": True}}, "autoscale": {"enabled": True, "mode": "apply"}},
        "attention.hpa and autoscale.mode apply would both set",
    ),
}
