"""A JSON schema of the fields of a JobSet (jobset.x-k8s.io/v1alpha2) that ours uses, and no others.

Names and types are those of the API references of JobSet, of batch/v1 Job and of core/v1 Pod.
"""

from __future__ import annotations

from typing import Any


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


_TEXT = {"type": "string", "minLength": 1}
_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_COUNT = {"type": "integer", "minimum": 0}
# A quantity written as a number would be read as one, but names of resources want text here.
_QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": "^[0-9]+(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"},
}

_CONTAINER = _object(
    {"name": _NAME, "image": _TEXT, "command": _list(_TEXT)},
    args=_list(_TEXT),
    env=_list(
        _object({"name": {"type": "string", "pattern": "^[A-Z_][A-Z0-9_]*$"}, "value": _TEXT})
    ),
    ports=_list(_object({"containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}})),
    resources=_object({}, requests=_QUANTITIES, limits=_QUANTITIES),
    securityContext=_object({"capabilities": _object({"add": _list(_TEXT)})}),
    volumeMounts=_list(_object({"name": _NAME, "mountPath": {"type": "string", "pattern": "^/"}})),
)
_VOLUME = _object(
    {"name": _NAME},
    persistentVolumeClaim=_object({"claimName": _NAME}),
    emptyDir=_object({"medium": {"enum": ["", "Memory"]}}),
)
_POD = _object(
    {"restartPolicy": {"enum": ["Never"]}, "containers": _list(_CONTAINER)},
    terminationGracePeriodSeconds=_COUNT,
    volumes=_list(_VOLUME),
)
_EXIT_CODES = _object(
    {"operator": {"enum": ["In", "NotIn"]}, "values": _list({"type": "integer", "minimum": 0})},
    containerName=_NAME,
)
_JOB = _object(
    {
        "completionMode": {"enum": ["Indexed"]},
        "parallelism": _COUNT,
        "completions": _COUNT,
        "template": _object({"spec": _POD}),
    },
    backoffLimit=_COUNT,
    podFailurePolicy=_object(
        {
            "rules": _list(
                _object(
                    {"action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}},
                    onExitCodes=_EXIT_CODES,
                )
            )
        }
    ),
)
_FAILURE_POLICY = _object(
    {"maxRestarts": _COUNT},
    rules=_list(
        _object(
            {
                "action": {
                    "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                }
            },
            onJobFailureReasons=_list(
                {
                    "enum": [
                        "BackoffLimitExceeded",
                        "DeadlineExceeded",
                        "FailedIndexes",
                        "MaxFailedIndexesExceeded",
                        "PodFailurePolicy",
                    ]
                }
            ),
        )
    ),
)
SCHEMA = _object(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": _object({"name": _NAME}),
        "spec": _object(
            {
                "replicatedJobs": _list(
                    _object(
                        {"name": _NAME, "replicas": _COUNT, "template": _object({"spec": _JOB})}
                    )
                )
            },
            network=_object({}, enableDNSHostnames={"type": "boolean"}, subdomain=_NAME),
            failurePolicy=_FAILURE_POLICY,
        ),
    }
)
