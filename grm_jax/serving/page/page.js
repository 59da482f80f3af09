// The judge's page. All text of users and of the model is set as textContent, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("form"), list = $("responses"), verdict = $("verdict"), progress = $("progress");
const EXAMPLE = {
  query: "A train leaves at 14:40 and arrives at 16:05. How long is the journey?",
  responses: [
    "From 14:40 to 16:05 it is 1 hour and 25 minutes.",
    "The journey takes 2 hours and 25 minutes.",
    "About an hour and a half.",
  ],
  criteria: "The duration is exact.",
};
let running = null;  // the AbortController of the request in flight

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  const { text, ...rest } = options;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(rest)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function addResponse(text = "") {
  const made = $("response").content.cloneNode(true);
  made.querySelector("textarea").value = text;
  made.querySelector(".remove").addEventListener("click", (event) => {
    event.target.closest(".response").remove();
    number();
  });
  list.append(made);
  number();
}

function number() {
  const all = [...list.children];
  all.forEach((box, i) => {
    const [label, area, remove] = ["label", "textarea", ".remove"].map((s) => box.querySelector(s));
    area.id = `response-${i}`;
    label.htmlFor = area.id;
    label.textContent = `Response ${i + 1}`;
    remove.setAttribute("aria-label", `Remove response ${i + 1}`);
    remove.hidden = all.length === 1;
  });
}

function fill({ query, responses, criteria }) {
  $("query").value = query;
  $("criteria").value = criteria;
  list.replaceChildren();
  responses.forEach(addResponse);
}

function headers() {
  const token = $("token").value;
  return {
    "Content-Type": "application/json",
    ...(token ? { Authorization: `Bearer ${token}` } : {}),
  };
}

// Server-sent events of a reply to a POST, which EventSource can not make.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    kept += value;
    const blocks = kept.split("\n\n");
    kept = blocks.pop();
    for (const block of blocks) {
      const [event, data] = block.split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
      yield { event, data: JSON.parse(data) };
    }
  }
}

async function judge() {
  const responses = [...list.querySelectorAll("textarea")].map((area) => area.value);
  const asked = {
    query: $("query").value, responses, stream: true,
    k: Number($("k").value), seed: Number($("seed").value),
  };
  if ($("criteria").value.trim()) asked.criteria = $("criteria").value;
  running = new AbortController();
  working(true);
  try {
    const reply = await fetch("/v1/judge", {
      method: "POST", headers: headers(), body: JSON.stringify(asked), signal: running.signal,
    });
    if (!reply.ok) {
      const said = await reply.json();
      return problem(said.error.message, reply.status === 401);
    }
    for await (const { event, data } of events(reply.body)) {
      if (event === "progress") {
        const critiques = `${data.finished} of ${data.k} critiques`;
        progress.textContent = `${data.state} … ${critiques}, ${Math.round(data.seconds)} s`;
      } else if (event === "error") {
        problem(data.error.message);
      } else {
        show(data, responses.length);
      }
    }
  } catch (error) {
    problem(error.name === "AbortError" ? "stopped" : `no answer from the server (${error.message})`);
  } finally {
    working(false);
  }
}

function working(on) {
  $("judge").disabled = on;
  $("stop").hidden = !on;
  progress.textContent = on ? "waiting …" : "";
}

function problem(message, token = false) {
  verdict.replaceChildren(element("p", { class: "problem", role: "alert", text: message }));
  if (token) $("token").focus();
}

const short = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(2));

function show(said, n) {
  const parts = [];
  if (said.failure !== null) {
    parts.push(
      element("h2", { text: "No verdict" }),
      element("p", { class: "problem", text: `No critique could be read: ${said.failure}.` }),
    );
  } else {
    const winner = n === 1 ? `Score ${short(said.scores[0])}`
      : said.tie ? `A tie of ${said.best.map((i) => i + 1).join(" and ")}`
      : `Response ${said.winner + 1} wins`;
    parts.push(element("h2", { id: "winner", text: winner }), bars(said, n));
  }
  parts.push(facts(said), element("h3", { text: "Critiques" }));
  said.critiques.forEach((critique, i) => parts.push(critiqueOf(critique, i)));
  verdict.replaceChildren(...parts);
  verdict.focus({ preventScroll: false });
}

function bars(said, n) {
  const high = n === 1 ? Math.max(1, said.scores[0]) : 10;
  const rows = said.scores.flatMap((score, i) => {
    const best = said.best.includes(i) ? " best" : "";
    const bar = element("div", { class: "bar" });
    bar.style.width = `${Math.max(0, Math.min(100, (100 * score) / high))}%`;
    const spread = element("small", { text: ` ± ${said.std[i].toFixed(1)}` });
    return [
      element("span", { class: `name${best}`, text: `Response ${i + 1}` }),
      element("div", { class: `track${best}`, role: "img",
        "aria-label": `Response ${i + 1}: mean score ${short(score)} of ${high}` }, bar),
      element("span", { class: "number", text: short(score) }, spread),
    ];
  });
  return element("div", { class: "bars" }, ...rows);
}

function facts(said) {
  const failed = Object.entries(said.failures).map(([name, count]) => `${count} ${name}`);
  const text = [
    said.agreement === null ? null : `${Math.round(100 * said.agreement)}% of the votes agree`,
    `method: ${said.method}`,
    `${said.usage.samples} critiques, ${said.usage.sampled_tokens} tokens`,
    failed.length ? `unreadable: ${failed.join(", ")}` : null,
    said.scalar === null ? null : `scalar RM: ${said.scalar.map((x) => x.toFixed(2)).join(" / ")}`,
    `${said.seconds.toFixed(1)} s`, `judge ${said.judge.slice(0, 12)}`,
  ];
  return element("p", { class: "facts", text: text.filter(Boolean).join(" · ") });
}

/** The responses that a critique read, counted from 1; groups that were read apart by a bar. */
function shown(critique) {
  const groups = critique.groups ?? [critique.order];
  return groups.map((group) => group.map((j) => j + 1).join(", ")).join(" | ");
}

function critiqueOf(critique, i) {
  const scores = critique.scores === null ? critique.failure : critique.scores.map(short).join(" / ");
  const notes = [
    critique.votes || critique.scores === null ? null : "does not vote",
    critique.meta === null ? null : `meta RM ${critique.meta.toFixed(2)}`,
    critique.order.length > 1 ? `saw ${shown(critique)}` : null,
    critique.finish_reason === "length" ? "cut at the length limit" : null,
  ];
  return element(
    "details", { class: critique.votes ? "critique" : "critique left-out" },
    element("summary", {},
      element("span", { text: `${i + 1}.` }),
      element("span", { class: "chips", text: scores }),
      element("span", { class: "note", text: notes.filter(Boolean).join(" · ") })),
    critique.principles ? element("h4", { text: "Principles" }) : null,
    critique.principles ? element("pre", { text: critique.principles }) : null,
    element("h4", { text: "Critique" }), element("pre", { text: critique.critique }));
}

async function hello() {
  try {
    const reply = await fetch("/ready");
    const said = await reply.json();
    if (!reply.ok) {
      $("model").textContent = said.error.message;
      setTimeout(hello, 3000);
      return;
    }
    const helped = [said.guided ? "meta RM" : null, said.scalar ? "scalar RM" : null].filter(Boolean);
    $("model").textContent = said.model + (helped.length ? ` with ${helped.join(" and ")}` : "");
    $("k").value = said.k;
    $("k").max = said.limits.k;
  } catch {
    $("model").textContent = "the server does not answer";
  }
}

$("add").addEventListener("click", () => {
  addResponse();
  list.lastElementChild.querySelector("textarea").focus();
});
$("example").addEventListener("click", () => fill(EXAMPLE));
$("stop").addEventListener("click", () => running?.abort());
form.addEventListener("submit", (event) => {
  event.preventDefault();
  judge();
});
addResponse();
addResponse();
hello();
