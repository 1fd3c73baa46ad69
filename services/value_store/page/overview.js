// The run at a glance.
import { html } from "/page/vendor/htm-preact-3.1.1.js";
import { clock, number, whole } from "/page/api.js";

function Card({ name, value, note }) {
  return html`<dl class="card">
    <dt>${name}</dt>
    <dd>${value}${note && html`<small>${note}</small>`}</dd>
  </dl>`;
}

function notices(run) {
  const found = [];
  if (run.store_waiting_for) found.push(`The value store waits for ${run.store_waiting_for}. Shown is what it knew last.`);
  if (!run.learner) found.push("The learner has not reported yet.");
  else if (!run.learner.alive) found.push(`The learner is away: its last word came at ${clock(run.learner.at_s)}.`);
  else if (run.learner.waiting_for) found.push(`The learner waits for ${run.learner.waiting_for}.`);
  const waiting = run.training.state === "stopping" ? "The early stop waits" : "Training leases wait";
  if (run.training.waiting_for) found.push(`${waiting} for ${run.training.waiting_for}.`);
  return found;
}

function HeatMap({ snapshots }) {
  const width = 600;
  const height = 160;
  const bins = 20;
  const column = width / Math.max(1, snapshots.length);
  const cells = snapshots.flatMap(({ counts }, i) => {
    const most = Math.max(1, ...counts);
    return counts.map(
      (count, bin) =>
        count > 0 &&
        html`<rect
          class="heat"
          x=${i * column}
          y=${height - ((bin + 1) * height) / bins}
          width=${column + 0.5}
          height=${height / bins + 0.5}
          opacity=${0.1 + (0.9 * count) / most}
        />`,
    );
  });
  const last = snapshots[snapshots.length - 1];
  const middle = last ? last.counts.slice(4, 16).reduce((a, b) => a + b, 0) : 0;
  const words = `Histogram of v̂ over time; now ${whole(middle)} prompts lie between 0.2 and 0.8.`;
  return html`<figure style="margin:0">
    <svg viewBox="0 0 ${width} ${height}" role="img" aria-label=${words}>
      ${cells}
      <text x="4" y="12">v̂ = 1</text>
      <text x="4" y=${height - 4}>v̂ = 0</text>
    </svg>
    <figcaption class="soft">${words}</figcaption>
  </figure>`;
}

function Leases({ leases }) {
  const columns = ["leased", "outstanding", "trained", "stale", "failed", "scored", "cancelled"];
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Leases by purpose and state">
    <table>
      <caption class="soft" style="text-align:left">Leases by purpose and state</caption>
      <thead>
        <tr><th scope="col">purpose</th>${columns.map((name) => html`<th scope="col">${name}</th>`)}</tr>
      </thead>
      <tbody>
        ${Object.entries(leases).map(
          ([purpose, counts]) =>
            html`<tr>
              <th scope="row">${purpose}</th>
              ${columns.map((name) => html`<td id=${`${purpose}-${name}`}>${whole(counts[name] ?? 0)}</td>`)}
            </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

export function Overview({ run }) {
  const { training, policy, queues, learner } = run;
  const alive = run.replicas.filter((replica) => replica.alive);
  const slots = alive.reduce((sum, replica) => sum + replica.slots, 0);
  return html`<section aria-label="The run at a glance" id="overview">
    ${notices(run).map((text) => html`<p class="notice">${text}</p>`)}
    <div class="cards">
      <${Card} name="Training" value=${training.state} note="${whole(training.trained)} of ${whole(training.total)}" />
      <${Card} name="Reward, recent mean" value=${number(run.reward_mean)} />
      <${Card} name="Staleness, recent mean" value=${number(run.staleness_mean, 2)} note="policy versions" />
      <${Card} name="Policy version" value=${policy ? policy.version : "–"} note=${policy ? `lineage ${policy.lineage}` : "none yet"} />
      <${Card} name="Drift clock z" value=${number(run.z_now)} note=${policy ? `last step ${number(policy.drift, 4)}` : ""} />
      <${Card} name="Learner step" value=${learner?.step ?? "–"} note=${learner ? learner.state : "not reported"} />
      <${Card} name="Replicas" value=${alive.length} note="${slots} slots, ${queues.held_leases} in use" />
      <${Card} name="Unread leases" value=${whole(queues.unread_leases)} />
      <${Card} name="Trajectories kept" value=${whole(queues.trajectories)} />
      <${Card} name="Updates waiting" value=${whole(Math.max(0, queues.posterior_updates - 1))} />
      <${Card} name="Dead letters" value=${whole(queues.dead_letters)} />
      <${Card} name="Visits" value=${whole(run.visits)} note="${whole(run.prompts)} prompts" />
    </div>
    <h2>Leases</h2>
    <${Leases} leases=${run.leases} />
    <h2>Values over time</h2>
    <${HeatMap} snapshots=${run.v_hat_over_time} />
  </section>`;
}
