// The browser of critiques. Text of models and benchmarks only ever becomes text nodes.
"use strict";
const benches = JSON.parse(document.getElementById("data").textContent);
const PAGE = 300;

function node(tag, text, attributes) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return made;
}

function marked(tag, text, word) {
  const made = node(tag);
  if (!word) { made.textContent = text; return made; }
  const low = text.toLowerCase();
  let start = 0;
  for (let at = low.indexOf(word); at >= 0; at = low.indexOf(word, start)) {
    made.append(text.slice(start, at), node("mark", text.slice(at, at + word.length)));
    start = at + word.length;
  }
  made.append(text.slice(start));
  return made;
}

// "Specific Criteria: ... Analysis: ...": the judge's own principles come first.
function sections(text) {
  const found = /^\s*Specific Criteria:([\s\S]*?)(?=^Analysis:)/m.exec(text);
  return found ? [found[1].trim(), text.slice(found.index + found[0].length)] : ["", text];
}

const CLASS = { right: "good", wrong: "bad", tie: "soft", unjudged: "bad" };

function tag(verdict) { return node("span", verdict, { class: "tag " + (CLASS[verdict] || "") }); }

function scores(values) { return values === null ? "no scores" : values.map(shown).join(" : "); }

function shown(value) { return Number.isInteger(value) ? String(value) : value.toFixed(2); }

function details(bench, record, word) {
  const article = document.createDocumentFragment();
  if (bench.private) {
    article.append(node("p", "The authors of this benchmark ask that its rows are not published " +
      "as plain text: look the id up in their file.", { class: "soft small" }));
  }
  const head = node("p");
  head.append(tag(record.verdict), node("b", record.id));
  if (record.section) head.append(node("span", "  " + record.section, { class: "soft" }));
  article.append(head);
  if (record.totals) {
    article.append(node("p", record.used + ", mean scores  " + scores(record.totals),
      { class: "small" }));
  }
  for (const turn of record.turns) {
    article.append(node("h3", turn[0]), marked("pre", turn[1], word));
  }
  const grid = node("div", null, { class: "responses" });
  record.responses.forEach((text, i) => {
    const box = node("div");
    const title = node("h3", "response " + (i + 1));
    if (record.best.includes(i)) title.append(node("span", " best", { class: "good" }));
    const shown = text === "" ? (bench.private ? "(not shown)" : "(empty)") : text;
    box.append(title, marked("pre", shown, word));
    grid.append(box);
  });
  article.append(grid);
  article.append(node("h3", record.samples.length + " samples"));
  for (const sample of record.samples) {
    const box = node("details");
    box.open = sample === record.samples[0];
    const line = node("summary");
    line.append(tag(sample.verdict),
      (sample.index < 0 ? "greedy" : "sample " + sample.index) + "   " + scores(sample.scores));
    if (sample.failure) line.append(node("span", "  " + sample.failure, { class: "bad" }));
    if (sample.meta !== null) line.append(node("span", "  meta " + sample.meta.toFixed(2),
      { class: "soft" }));
    line.append(node("span", "  shown as " + sample.order.map((i) => i + 1).join(", "),
      { class: "soft" }));
    box.append(line);
    const [principles, critique] = sections(sample.text);
    if (principles) box.append(node("h3", "principles"), marked("pre", principles, word));
    if (critique) box.append(node("h3", "critique"), marked("pre", critique, word));
    article.append(box);
  }
  return article;
}

function searchable(record) {
  if (!record.haystack) {
    record.haystack = [record.id, ...record.turns.map((t) => t[1]), ...record.responses,
      ...record.samples.map((s) => s.text)].join("\n").toLowerCase();
  }
  return record.haystack;
}

function browse(section, bench) {
  const [input, verdict, part] = section.querySelectorAll(".filters input, .filters select");
  const list = section.querySelector(".list");
  const article = section.querySelector("article");
  const count = section.querySelector(".count");
  for (const name of [...new Set(bench.records.map((r) => r.section))].filter(Boolean)) {
    part.append(node("option", name));
  }
  let current = null;
  function open(record, button) {
    if (current) current.removeAttribute("aria-current");
    current = button;
    button.setAttribute("aria-current", "true");
    article.replaceChildren(details(bench, record, input.value.trim().toLowerCase()));
  }
  function fill() {
    const word = input.value.trim().toLowerCase();
    const found = bench.records.filter((r) => (!verdict.value || r.verdict === verdict.value) &&
      (!part.value || r.section === part.value) && (!word || searchable(r).includes(word)));
    count.textContent = found.length + " of " + bench.of +
      (bench.records.length < bench.of ? "; this file holds " + bench.records.length +
        ", wrong ones first, the others stand in samples.jsonl" : "") +
      (found.length > PAGE ? "; the first " + PAGE + " listed" : "");
    list.replaceChildren();
    article.replaceChildren();
    current = null;
    found.slice(0, PAGE).forEach((record, i) => {
      const button = node("button", null, { type: "button" });
      button.append(tag(record.verdict), 
        record.turns.length ? record.turns[record.turns.length - 1][1].slice(0, 90) : record.id);
      button.addEventListener("click", () => open(record, button));
      list.append(button);
      if (i === 0) open(record, button);
    });
    if (!found.length) article.append(node("p", "Nothing fits.", { class: "soft" }));
  }
  for (const one of [input, verdict, part]) one.addEventListener("input", fill);
  fill();
}

const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = [...document.querySelectorAll("[role=tabpanel]")];
const begun = new Set();
function show(index) {
  tabs.forEach((t, i) => t.setAttribute("aria-selected", String(i === index)));
  panels.forEach((p, i) => { p.hidden = i !== index; });
  if (!begun.has(index)) { begun.add(index); browse(panels[index], benches[index]); }
}
tabs.forEach((t, i) => t.addEventListener("click", () => show(i)));
show(0);
