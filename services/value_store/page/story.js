// One prompt's story: its posterior over visits, its rewards, every update.
import { html, useEffect, useState } from "/page/vendor/htm-preact-3.1.1.js";
import { clock, getJson, number, whole } from "/page/api.js";

function Chart({ entries }) {
  const width = 600;
  const height = 200;
  const x = (i) => 30 + ((width - 40) * (i + 0.5)) / entries.length;
  const y = (v) => 10 + (height - 20) * (1 - v);
  const [lower, upper] = [0, 1].map((end) => entries.map((one, i) => `${x(i)},${y(one.interval[end])}`));
  const line = entries.map((one, i) => `${x(i)},${y(one.v_hat_after)}`);
  const words = `Value over ${entries.length} visits, from ${number(entries[0].v_hat_after)} to ${number(entries[entries.length - 1].v_hat_after)}; the band is the 95 % interval, dots are rewards.`;
  return html`<figure style="margin:0">
    <svg viewBox="0 0 ${width} ${height}" role="img" aria-label=${words}>
      <text x="4" y="16">1</text><text x="4" y=${height - 6}>0</text>
      <polygon class="band" points=${[...upper, ...lower.reverse()].join(" ")} />
      <polyline class="mean" points=${line.join(" ")} />
      ${entries.map((one, i) => html`<circle class=${one.reward > 0.5 ? "hit" : "miss"} cx=${x(i)} cy=${y(one.reward)} r="3" />`)}
    </svg>
    <figcaption class="soft">${words}</figcaption>
  </figure>`;
}

function Updates({ entries }) {
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Every update, newest first">
    <table id="history">
      <thead>
        <tr>${["lease", "version", "reward", "v̂ before", "v̂ after", "ρ", "n_eff", "at"].map((name) => html`<th scope="col">${name}</th>`)}</tr>
      </thead>
      <tbody>
        ${[...entries].reverse().map(
          (one) => html`<tr key=${one.lease_id}>
            <td>${one.lease_id} <span class="soft">${one.outcome}</span></td>
            <td>${one.version}</td><td>${number(one.reward, 2)}</td>
            <td>${number(one.v_hat_before)}</td><td>${number(one.v_hat_after)}</td>
            <td>${number(one.rho)}</td><td>${number(one.n_eff, 1)}</td><td>${clock(one.at_s)}</td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

const PARTS = { prompt: "Prompt", generated: "Model", observation: "Tool output" };

function Trajectory({ one }) {
  const count = (many, word) => `${whole(many)} ${word}${many === 1 ? "" : "s"}`;
  const told = [count(one.turns, "turn"), count(one.tool_calls.length, "tool call"), `ended by ${one.end_reason}`];
  const tools = one.tool_calls.map((call) => `turn ${call.turn + 1}: ${call.status} in ${number(call.wall_s, 1)} s`);
  return html`<details class="trajectory">
    <summary>Reward ${number(one.reward, 2)}, version ${one.version}, ${told.join(", ")}, ${clock(one.finished_at_s)}</summary>
    <p class="soft">${one.lease_id}; v̂ at the lease ${number(one.v_hat)}${tools.length > 0 && `; tools: ${tools.join(", ")}`}</p>
    ${one.segments.map((part) => {
      const title = `${PARTS[part.kind]}${part.version === null ? "" : `, version ${part.version}`}, ${count(part.tokens, "token")}`;
      return html`<details open=${part.kind === "generated"}>
        <summary class="soft">${title}</summary>
        ${part.text === null ? html`<p class="soft">The tokenizer is not beside the value store, so the text cannot be shown.</p>` : html`<pre>${part.text}</pre>`}
      </details>`;
    })}
  </details>`;
}

export function Story({ id }) {
  const [story, setStory] = useState({ prompt: null, entries: [], trajectories: [], trouble: null });
  useEffect(() => {
    let over = false;
    const ask = async () => {
      const parts = ["", "/history", "/trajectories"];
      const [prompt, history, last] = await Promise.all(parts.map((part) => getJson(`/v1/prompts/${id}${part}`)));
      if (over) return;
      setStory((was) => ({
        prompt: prompt.body ?? was.prompt,
        entries: history.body ? [...history.body.entries].reverse() : was.entries,
        trajectories: last.body?.trajectories ?? was.trajectories,
        trouble: prompt.trouble ?? history.trouble ?? last.trouble,
      }));
    };
    ask();
    const timer = setInterval(ask, 2000);
    return () => {
      over = true;
      clearInterval(timer);
    };
  }, [id]);
  const { prompt, entries, trajectories, trouble } = story;
  return html`<section aria-label="A prompt's story" id="story">
    <h2>Prompt ${id}</h2>
    <p><a href="#/">All prompts</a></p>
    ${trouble && html`<p class="notice bad">${trouble}</p>`}
    ${prompt &&
    html`<pre>${prompt.question}</pre>
      <details><summary>Answer</summary><pre>${prompt.answer}</pre></details>
      <div class="cards">
        <dl class="card"><dt>v̂</dt><dd>${number(prompt.v_hat)}<small>95 %: ${number(prompt.interval[0])} to ${number(prompt.interval[1])}</small></dd></dl>
        <dl class="card"><dt>n_eff</dt><dd>${number(prompt.n_eff, 1)}<small>observations</small></dd></dl>
        <dl class="card"><dt>Visits</dt><dd>${whole(prompt.visits)}<small>${prompt.in_flight ? "in flight now" : "not in flight"}</small></dd></dl>
        <dl class="card"><dt>Source</dt><dd>${prompt.source}<small>${prompt.split}, ${prompt.environment}</small></dd></dl>
      </div>`}
    ${entries.length > 0
      ? html`<h2>Value over visits</h2><${Chart} entries=${entries} /><h2>Updates</h2><${Updates} entries=${entries} />`
      : html`<p class="soft">No visits yet.</p>`}
    <h2>Last trajectories</h2>
    ${trajectories.length === 0 && html`<p class="soft">None of the run's newest is of this prompt.</p>`}
    ${trajectories.map((one) => html`<${Trajectory} key=${one.lease_id} one=${one} />`)}
  </section>`;
}
