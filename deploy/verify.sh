#!/usr/bin/env bash
# Builds and runs the profile cpu on this machine's Docker Engine, and checks the product in it: a fresh run trains in
# containers, values change, a second replica takes leases, the sandbox reaches nothing, every query of the dashboards and
# alert rules names a metric that is exported. Ends with `down -v` on its own project, so it touches no other run.
#
# COMPOSE (docker compose): the compose command. COMPOSE_FILE (docker-compose.yml): with deploy/compose.ray.yml behind it
# every replica is a node of a Ray cluster; with deploy/compose.monitoring.yml Prometheus is asked what it scrapes.
# NO_BUILD=1: images are there. STEPS (3): optimizer steps to wait for. DEADLINE_S (600): of each wait. KEEP=1: leave
# everything running.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra COMPOSE <<<"${COMPOSE:-docker compose}"
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-singlestream-verify} COMPOSE_PROFILES=cpu
export DOCKER_BUILDKIT=1 COMPOSE_FILE=${COMPOSE_FILE:-docker-compose.yml}
export VALUE_STORE_PORT=${VALUE_STORE_PORT:-0} PROMETHEUS_PORT=${PROMETHEUS_PORT:-0}
STEPS=${STEPS:-3}
DEADLINE_S=${DEADLINE_S:-600}

say() { printf '== [%ss] %s\n' "$SECONDS" "$*"; }
die() { printf 'verify: %s\n' "$*" >&2; "${COMPOSE[@]}" ps -a >&2; "${COMPOSE[@]}" logs --tail 20 >&2; exit 1; }
store() {  # store PATH: the value store's answer, asked from inside its container
    "${COMPOSE[@]}" exec -T value_store python3 -c '
import sys, urllib.request
token = open("/run/secrets/read_token").read()
request = urllib.request.Request("http://127.0.0.1:8100" + sys.argv[1], headers={"Authorization": "Bearer " + token})
print(urllib.request.urlopen(request, timeout=30).read().decode())' "$1"
}
metrics() {  # metrics SERVICE PORT: asked from inside its container, where it listens
    "${COMPOSE[@]}" exec -T "$1" python3 -c '
import sys, urllib.request
from pathlib import Path
own = Path("/tmp/listening_on")
host = own.read_text().strip() if own.exists() else "127.0.0.1"
print(urllib.request.urlopen(f"http://{host}:{sys.argv[1]}/metrics", timeout=30).read().decode())' "$2"
}
field() { python3 -c "import json, sys; d = json.load(sys.stdin); print($1)"; }
wait_for() {  # wait_for WHAT COMMAND...: until the command succeeds
    local what=$1 started=$SECONDS
    shift
    until "$@"; do
        [ $((SECONDS - started)) -lt "$DEADLINE_S" ] || die "waited $DEADLINE_S s for $what"
        sleep 2
    done
}
trained() { [ "$(store /v1/training | field "d['trained']")" -ge "$1" ]; }
replicas_at_work() { [ "$(store /v1/stats | field "sum(r['alive'] and r['in_use'] > 0 for r in d['replicas'])")" -ge "$1" ]; }

# A run that does not end while it is looked at, however fast the machine is.
LONG_RUN=$(mktemp --suffix=.yml)
{
    echo "services:"
    for service in value_store rollout learner $([[ $COMPOSE_FILE != *compose.ray.yml* ]] || echo ray_head); do
        echo "  $service: {environment: {SINGLESTREAM_RUN__TOTAL_STEPS: \"100000\"}}"
    done
} >"$LONG_RUN"
export COMPOSE_FILE=$COMPOSE_FILE:$LONG_RUN

say "configuration"
"${COMPOSE[@]}" config -q
if [ -z "${NO_BUILD:-}" ]; then
    say "build"
    "${COMPOSE[@]}" build -q
fi
if [ -z "${KEEP:-}" ]; then trap '"${COMPOSE[@]}" down -v -t 10 --remove-orphans >/dev/null 2>&1; rm -f "$LONG_RUN"' EXIT; fi
say "up"
"${COMPOSE[@]}" up -d --wait --wait-timeout "$DEADLINE_S" --no-build --pull never >/dev/null 2>&1 || die "not everything became healthy"
"${COMPOSE[@]}" ps --format 'table {{.Name}}\t{{.Status}}'

say "a fresh run trains $STEPS steps"
BATCH=$("${COMPOSE[@]}" exec -T value_store deploy/entrypoint python3 -c 'from singlestream.config import load_config; print(load_config().run.train_batch_size)')
wait_for "$STEPS steps" trained $((STEPS * BATCH))
store /v1/training
store "/v1/stats" | field "'  visits %d, mean posterior %.3f, Brier %s' % (d['visits'], d['v_hat_mean'], d['brier'])"
store "/v1/prompts?visits_min=1&limit=3" | field "'  changed values: %s' % [(p['prompt_id'][:8], round(p['v_hat'], 3), p['visits']) for p in d['prompts']]"
[ "$(store '/v1/prompts?visits_min=1&limit=3' | field "sum(p['v_hat'] != 0.5 for p in d['prompts'])")" -gt 0 ] || die "no value has changed"

say "episodes reach the sandbox"
calls() { metrics sandbox_gateway 8101 | awk '/^singlestream_sandbox_runs_total\{status="ok"\}/ {print int($2)}'; }
called() { [ "$(calls)" -gt 0 ]; } 2>/dev/null
wait_for "a run in the sandbox" called
printf '  %s runs\n' "$(calls)"

say "a second replica takes leases"
"${COMPOSE[@]}" up -d --no-build --no-recreate --no-deps --scale rollout=2 rollout >/dev/null 2>&1
wait_for "two replicas at work" replicas_at_work 2
store /v1/stats | field "'\n'.join('  %(name)s: %(in_use)d of %(slots)d slots, version %(version)d' % r for r in d['replicas'])"
store /v1/ledger | field "'  ' + str(d['train'])"
store /v1/ledger | field "d['train']['adds_up'] or sys.exit('the ledger does not add up')" >/dev/null

say "a replica that is stopped hands its episodes over, and the other goes on"
SECOND=$("${COMPOSE[@]}" ps -q rollout | sed -n 2p)
docker stop -t 90 "$SECOND" >/dev/null
SAID=$(docker logs "$SECOND" 2>&1)
grep -E "hand(s|ing|ed) .*over|handed over" <<<"$SAID" || die "the stopped replica says nothing of a hand-over"
[ "$(docker inspect -f '{{.State.ExitCode}}' "$SECOND")" = 0 ] || die "the stopped replica ended with an error"
AFTER=$(store /v1/training | field "d['trained']")
wait_for "a step after it" trained $((AFTER + BATCH))
store /v1/ledger | field "d['train']['adds_up'] or sys.exit('the ledger does not add up')" >/dev/null

say "one-shots: estimate, then export of the newest checkpoint"
"${COMPOSE[@]}" run --rm -T estimate --split eval --limit 16 --n 2 2>/dev/null | sed 's/^/  /' || die "estimate failed"
checkpoint() { "${COMPOSE[@]}" exec -T learner sh -c 'ls -d /runs/*/checkpoints/*' >/dev/null 2>&1; }
wait_for "a checkpoint" checkpoint
"${COMPOSE[@]}" run --rm -T export /runs/exported 2>/dev/null | sed 's/^/  /' || die "export failed"

say "every metric of the dashboards and rules is exported"
{ store /metrics && metrics sandbox_gateway 8101 && metrics rollout 8102 && metrics learner 8103; } >/tmp/singlestream-metrics.$$ || die "a service does not answer with its metrics"
python3 - /tmp/singlestream-metrics.$$ <<'PY' || die "a query names a metric that nothing exports"
import re, sys
from pathlib import Path
exported = set(re.findall(r"^# TYPE (\S+)", Path(sys.argv[1]).read_text(), re.M))
asked = set()
for file in (*Path("deploy/grafana/dashboards").glob("*.json"), Path("deploy/prometheus/rules.yml")):
    asked |= set(re.findall(r"\bsinglestream_\w+", file.read_text()))
missing = {name for name in asked if name not in exported and re.sub(r"_(bucket|sum|count)$", "", name) not in exported}
print(f"  {len(asked)} metrics asked for, {len(missing)} missing {sorted(missing) or ''}")
sys.exit(bool(missing))
PY
rm -f /tmp/singlestream-metrics.$$

say "from the sandbox's container nothing is reachable"
mapfile -t IDS < <("${COMPOSE[@]}" ps -q)
ADDRESSES=$(docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}' "${IDS[@]}" | tr '\n' ' ')
GATEWAY=$("${COMPOSE[@]}" ps -q sandbox_gateway)
OWN=$(docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$GATEWAY")
# Every port that any container listens on, Ray's among them, in hexadecimal.
LISTENING=$(for id in "${IDS[@]}"; do docker exec "$id" cat /proc/net/tcp /proc/net/tcp6 2>/dev/null || true; done |
    awk '$4 == "0A" {sub(/.*:/, "", $2); print $2}' | sort -u | tr '\n' ',')
# shellcheck disable=SC2086  # a list of addresses
docker exec -i "$GATEWAY" python3 - "$LISTENING" "$OWN" $ADDRESSES <<'PY' || die "the sandbox reaches what it must not"
import socket, sys
from concurrent.futures import ThreadPoolExecutor
listening, own, *others = sys.argv[1:]
ports = {22, 53, 80, 443, 2375, 3000, 6379, 6380, 8100, 8101, 8102, 8103, 8265, 9090, 52365}
ports |= {int(port, 16) for port in listening.split(",") if port}
targets = [(host, port) for host in sorted(set(others) - {own}) for port in sorted(ports)]
targets += [("1.1.1.1", 53), ("8.8.8.8", 443), ("169.254.169.254", 80)]

def answers(target):
    try:
        socket.create_connection(target, timeout=2).close()
    except OSError:
        return False
    return True

with ThreadPoolExecutor(32) as pool:
    reached = [target for target, yes in zip(targets, pool.map(answers, targets)) if yes]
for name in ("redis", "value_store", "learner"):
    try:
        reached.append((name, socket.gethostbyname(name)))
    except OSError:
        pass
print(f"  {len(targets)} addresses and ports tried, {len(reached)} reached {reached or ''}")
sys.exit(bool(reached))
PY

if [[ $COMPOSE_FILE == *compose.ray.yml* ]]; then
    say "Ray answers who holds its token, and nobody else"
    ray_answers() { "${COMPOSE[@]}" exec -T "$@" ray_head sh -c 'ray health-check --address "$(cat /tmp/listening_on):6380"' 2>&1; }
    ray_answers >/dev/null || die "Ray does not answer who holds its token"
    STRANGER=$(ray_answers -e RAY_AUTH_TOKEN="$(printf '%064d' 0)") && die "Ray answers a stranger"
    grep -o -m 1 InvalidAuthToken <<<"$STRANGER" | sed 's/^/  a stranger is told: /' || die "Ray refuses a stranger for another reason: $STRANGER"
fi

if [[ $COMPOSE_FILE == *compose.monitoring.yml* ]]; then
    say "Prometheus scrapes every service and evaluates every rule"
    watched() { COMPOSE_PROFILES=cpu,monitoring "${COMPOSE[@]}" "$@"; }
    watched up -d --wait --no-deps --no-build --pull never prometheus >/dev/null 2>&1 || die "Prometheus did not become healthy"
    asked() { watched exec -T prometheus wget -q -O - "http://prometheus-front:9090/api/v1/$1"; }
    up_jobs() { asked targets | field "' '.join(sorted({t['labels']['job'] for t in d['data']['activeTargets'] if t['health'] == 'up'}))"; }
    all_up() { [ "$(up_jobs)" = "learner rollout sandbox_gateway value_store" ]; }
    wait_for "every job to be up" all_up
    evaluated() { asked rules | field "sum(r['health'] == 'ok' for g in d['data']['groups'] for r in g['rules'])"; }
    RULES=$(grep -c -- '- alert:' deploy/prometheus/rules.yml)
    all_evaluated() { [ "$(evaluated)" = "$RULES" ]; }
    wait_for "every rule to be evaluated" all_evaluated
    printf '  up: %s; %s rules evaluated\n' "$(up_jobs)" "$(evaluated)"

    say "an alert fires while a service is down, and ends when it is back"
    firing() { asked alerts | field "' '.join(sorted(a['labels']['job'] for a in d['data']['alerts'] if (a['labels']['alertname'], a['state']) == ('ServiceDown', 'firing')))"; }
    fires_for() { [ "$(firing)" = "$1" ]; }
    "${COMPOSE[@]}" stop sandbox_gateway >/dev/null 2>&1
    wait_for "ServiceDown to fire" fires_for sandbox_gateway
    printf '  ServiceDown: %s\n' "$(firing)"
    "${COMPOSE[@]}" start sandbox_gateway >/dev/null 2>&1
    wait_for "ServiceDown to end" fires_for ""
fi

say "done"
