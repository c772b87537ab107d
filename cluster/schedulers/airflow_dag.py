"""A nightly backfill for Airflow: a pod that submits to the standing Ray cluster and follows the job.

Needs apache-airflow-providers-cncf-kubernetes and the objects of cluster/kubernetes. The job is idempotent:
retries and overlaps redo nothing that is done. Nor do they try failed samples again, so that a retry hides
too many failures (code 3): have an alert for those.
"""

from datetime import UTC, datetime, timedelta

from airflow import DAG
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

BACKFILL = (
    "exec ray job submit --address http://featurex-head-svc:8265 --"
    " python /app/jobs/backfill.py --manifests \"'s3://BUCKET/manifests/dt={date}/*.parquet'\""
    " --from {{ macros.ds_add(ds, -2) }} --to {{ ds }}"
    " --output s3://BUCKET/features --extractor torchvision/resnet50 --gpus-per-extract-actor 1"
)

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"labels": {"app.kubernetes.io/component": "submit"}},
    "spec": {
        "restartPolicy": "Never",
        "serviceAccountName": "featurex-submit",
        "automountServiceAccountToken": False,
        "securityContext": {
            "fsGroup": 1000,
            "runAsGroup": 1000,
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "base",  # the name that the operator looks for
                "image": "REGISTRY/featurex-ray:0.1.0-cpu",
                "command": ["/bin/bash", "-ec"],
                "env": [
                    {"name": "RAY_AUTH_MODE", "value": "token"},
                    {
                        "name": "RAY_AUTH_TOKEN",
                        "valueFrom": {"secretKeyRef": {"name": "featurex-token", "key": "auth_token"}},
                    },
                ],
                "envFrom": [{"configMapRef": {"name": "featurex-settings"}}],
                "resources": {
                    "requests": {"cpu": "250m", "memory": "512Mi"},
                    "limits": {"cpu": "1", "memory": "1Gi"},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                    "runAsNonRoot": True,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108  an emptyDir
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    },
}

with DAG(
    dag_id="featurex_nightly",
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=23),
) as dag:
    KubernetesPodOperator(
        task_id="backfill",
        namespace="featurex",
        pod_template_dict=POD,
        arguments=[BACKFILL],
        get_logs=True,
        on_finish_action="delete_succeeded_pod",
        retries=3,
        retry_delay=timedelta(minutes=10),
    )
