"use strict";

/* Everything from the server is put into the page with textContent only. */

const $ = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
};
const number = (value, digits) =>
  value === null || value === undefined ? "–" : Number(value).toFixed(digits);

const STATE_CLASS = { ready: "good", failed: "bad", building: "busy", loading: "busy", draining: "busy" };
let apiKey = sessionStorage.getItem("pressgate-key") || "";
let rows = [];
let running = null;

function showProblem(text) {
  $("problem").textContent = text || "";
  $("problem").hidden = !text;
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.authorization = `Bearer ${apiKey}`;
  if (options.body) headers["content-type"] = "application/json";
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401 || response.status === 403) $("keyform").hidden = false;
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message || `the gateway answered ${response.status}`);
  }
  return response;
}

const fetchJson = async (path) => (await call(path)).json();

/* -- facts ------------------------------------------------------------------------------------ */

function fill(select, entries) {
  const before = select.value;
  const wanted = entries.map(([value]) => value).join("\n");
  if (select.dataset.entries === wanted) return;
  select.dataset.entries = wanted;
  select.replaceChildren(...entries.map(([value, text]) => {
    const option = make("option", text);
    option.value = value;
    return option;
  }));
  if (entries.some(([value]) => value === before)) select.value = before;
}

function actionButton(row, action, text) {
  const button = make("button", text, "small");
  button.type = "button";
  button.setAttribute("aria-label", `${text} ${row.level}`);
  button.addEventListener("click", async () => {
    button.disabled = true;
    const path = `/v1/levels/${encodeURIComponent(row.level)}:${action}`;
    try {
      await call(`${path}?model=${encodeURIComponent(row.model)}`, { method: "POST" });
      showProblem("");
    } catch (error) {
      showProblem(error.message);
    }
    button.disabled = false;
    refresh();
  });
  return button;
}

function ladderRow(row, several) {
  const tr = make("tr");
  const head = make("th", several ? `${row.model}@${row.level}` : row.level);
  head.scope = "row";
  const state = make("td", row.state, STATE_CLASS[row.state]);
  if (row.error) state.title = row.error;
  const approx = row.measured ? "" : "≈ ";
  const cells = [
    row.stored_bytes ? approx + number(row.stored_bytes / 1e6, 1) : "–",
    number(row.compression_ratio, 2),
    number(row.decode_tokens_per_s["1"], 0),
    number(row.speedup, 2),
    approx + number(row.perplexity_ratio, 3),
    number(row.top1_agreement, 3),
    String(row.leases),
  ];
  const act = make("td");
  if (row.state === "absent" || row.state === "failed") act.append(actionButton(row, "build", "Build"));
  if (row.state === "stored") act.append(actionButton(row, "warm", "Load"));
  if (row.state === "ready") act.append(actionButton(row, "evict", "Unload"));
  tr.append(head, make("td", row.family), state, ...cells.map((c) => make("td", c, "num")), act);
  return tr;
}

function showLadder(ladder) {
  rows = ladder.data;
  const models = [...new Set(rows.map((row) => row.model))];
  const body = document.querySelector("#ladder tbody");
  if (!body.contains(document.activeElement) || document.activeElement === document.body) {
    body.replaceChildren(...rows.map((row) => ladderRow(row, models.length > 1)));
  }
  $("estimates").hidden = rows.every((row) => row.measured);
  fill($("model"), models.map((name) => [name, name]));
  showLevels();
  const used = number(ladder.memory_used_bytes / 1e6, 0);
  const budget = number(ladder.memory_budget_bytes / 1e6, 0);
  const ready = rows.filter((row) => row.state === "ready").length;
  $("summary").textContent = `${ready} of ${rows.length} levels ready, ${used} of ${budget} MB in use`;
}

function showLevels() {
  const own = rows.filter((row) => row.model === $("model").value);
  fill($("level"), [["", "gateway decides"], ...own.map((row) => [row.level, row.level])]);
}

function showJobs(jobs) {
  const items = jobs.data.slice(0, 8).map((job) => {
    const item = make("li");
    item.append(make("strong", `${job.model}@${job.level}`), ` ${job.state} `);
    if (job.state === "running" || job.state === "queued") {
      const bar = make("progress");
      bar.value = job.progress;
      bar.setAttribute("aria-label", `Build of ${job.level}`);
      item.append(bar, ` ${Math.round(100 * job.progress)} % ${job.message}`);
    } else {
      item.append(job.error ? `– ${job.error}` : `in ${number(job.build_seconds, 1)} s`);
    }
    return item;
  });
  $("jobs").replaceChildren(...(items.length ? items : [make("li", "No builds yet.")]));
}

const BOUNDS = ["ttft_ms", "tpot_ms", "latency_ms", "memory_mb", "max_ppl_ratio", "min_agreement"];

function showPolicies(policies) {
  fill($("policy"), [["", "whichever matches"], ...policies.data.map((p) => [p.name, p.name])]);
  $("policies").replaceChildren(...policies.data.map((policy) => {
    const bounds = BOUNDS.filter((name) => policy[name] !== null).map((n) => `${n} ${policy[n]}`);
    const item = make("li");
    item.append(make("strong", policy.name));
    item.append(` – ${policy.objective}; ${bounds.join(", ") || "no bounds"}; `);
    item.append(`on a miss: ${policy.on_miss}`);
    if (policy.levels.length) item.append(`; levels: ${policy.levels.join(", ")}`);
    return item;
  }));
}

async function refresh() {
  try {
    const [ladder, jobs, policies] = await Promise.all(
      ["/v1/levels", "/v1/jobs", "/v1/policies"].map(fetchJson));
    showLadder(ladder);
    showJobs(jobs);
    showPolicies(policies);
    if (!running) showProblem("");
  } catch (error) {
    showProblem(error.message);
  }
}

/* -- asking ----------------------------------------------------------------------------------- */

function requestBody() {
  const sla = {};
  for (const input of document.querySelectorAll("[data-sla]")) {
    if (input.value !== "") sla[input.id] = Number(input.value);
  }
  if ($("policy").value) sla.policy = $("policy").value;
  if ($("objective").value) sla.objective = $("objective").value;
  const level = $("level").value;
  return {
    model: $("model").value + (level ? `@${level}` : ""),
    prompt: $("prompt").value,
    max_tokens: Number($("max_tokens").value) || 48,
    sla,
  };
}

function numbersTable(rowsOf, columns) {
  const table = make("table");
  const head = make("tr");
  for (const column of ["", ...columns]) head.append(make("th", column));
  table.append(head);
  for (const [name, values] of rowsOf) {
    const tr = make("tr");
    tr.append(make("th", name), ...columns.map((c) => make("td", number(values?.[c], 1), "num")));
    table.append(tr);
  }
  return table;
}

function showDecision(info) {
  const line = make("p");
  line.append(make("strong", info.level), ` by policy ${info.policy}: ${info.reason} `);
  line.append(make("span", info.slo_met ? "Budget kept." : "Budget missed.",
    info.slo_met ? "good" : "bad"));
  $("decision-id").value = info.decision_id;
  const columns = ["ttft_ms", "tpot_ms", "latency_ms", "memory_mb"];
  $("decision").replaceChildren(line, numbersTable(
    [["predicted", info.predicted], ["measured", info.measured]], columns));
}

function showExplanation(info) {
  const chosen = info.decision.level || info.decision.build;
  const line = make("p");
  line.append(make("strong", info.decision.action + (chosen ? ` ${chosen}` : "")));
  line.append(` by policy ${info.policy}: ${info.decision.reason}`);
  const table = make("table");
  const head = make("tr");
  for (const name of ["Level", "State", "First ms", "Per token ms", "In all ms", "MB", "Verdict"]) {
    head.append(make("th", name));
  }
  table.append(head);
  for (const level of info.levels || []) {
    const tr = make("tr", undefined, level.level === chosen ? "chosen" : "");
    const guess = level.predicted || {};
    tr.append(make("th", level.level), make("td", level.state));
    for (const name of ["ttft_ms", "tpot_ms", "latency_ms", "memory_mb"]) {
      tr.append(make("td", number(guess[name], 1), "num"));
    }
    tr.append(make("td", level.why, `why ${level.ok ? "good" : "bad"}`));
    table.append(tr);
  }
  $("decision").replaceChildren(line, table, ...became(info.result), otherwise(info.counterfactuals));
}

function became(result) {
  if (!result) return [];
  const kept = Object.entries(result.promises || {}).map(([name, promise]) =>
    `${name} ${promise.bound}: ${promise.kept ? "kept" : "broken"} (${number(promise.measured, 1)})`);
  const end = `Ended with status ${result.code} after ${number(result.seconds, 2)} s`;
  return [make("p", [end, ...kept].join("; ") + ".", result.slo_met === false ? "bad" : "")];
}

function otherwise(found) {
  const list = make("ul", undefined, "plain");
  const levels = (found?.levels || []).flatMap((one) => one.sentences);
  const others = [...(found?.tighter || []), found?.unpinned].filter(Boolean);
  list.append(...[...levels, ...others.map((one) => one.sentence)].map((text) => make("li", text)));
  return list;
}

function takeEvent(data) {
  if (data === "[DONE]") return;
  const chunk = JSON.parse(data);
  if (chunk.error) throw new Error(chunk.error.message);
  for (const choice of chunk.choices) $("answer").append(choice.text);
  if (chunk.compression) showDecision(chunk.compression);
}

async function readStream(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) takeEvent(event.replace(/^data: ?/, ""));
  }
}

function busy(is) {
  $("send").disabled = is;
  $("explain").disabled = is;
  $("stop").disabled = !is;
}

async function asking(work) {
  busy(true);
  running = new AbortController();
  showProblem("");
  $("answer").textContent = "";
  $("decision").replaceChildren();
  try {
    await work(running.signal);
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error.message);
  } finally {
    running = null;
    busy(false);
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  asking(async (signal) => {
    const body = JSON.stringify({ ...requestBody(), stream: true });
    await readStream(await call("/v1/completions", { method: "POST", body, signal }));
    refresh();
  });
});
$("explain").addEventListener("click", () => asking(async (signal) => {
  const body = JSON.stringify(requestBody());
  showExplanation(await (await call("/v1/explain", { method: "POST", body, signal })).json());
}));
$("lookup").addEventListener("submit", (event) => {
  event.preventDefault();
  asking(async (signal) => {
    const path = `/v1/decisions/${encodeURIComponent($("decision-id").value.trim())}`;
    showExplanation(await (await call(path, { signal })).json());
  });
});
$("stop").addEventListener("click", () => running?.abort());
$("model").addEventListener("change", showLevels);
$("keyform").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value.trim();
  sessionStorage.setItem("pressgate-key", apiKey);
  $("key").value = "";
  refresh();
});
refresh();
setInterval(() => { if (!document.hidden && !running) refresh(); }, 3000);
