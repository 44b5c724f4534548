// The browser over completions, and the charts' values under the pointer. Text from data only ever becomes text nodes.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PAGE_SIZE = 10;
const MAX_CELLS = 2_000_000; // of the table that finds the longest common subsequence
let page = 0;

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Differences: word by word, and character by character where a script writes no spaces.

const UNSPACED = "\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Thai}\\p{Script=Lao}\\p{Script=Khmer}\\p{Script=Myanmar}";
const WORDS = new RegExp(`[${UNSPACED}]|\\s+|[^\\s${UNSPACED}]+`, "gu");

function pieces(text, other) {
  if (!/\s/.test(text.trim()) && !/\s/.test(other.trim())) return Array.from(text);
  return text.match(WORDS) ?? [];
}

function differences(truth, answer) {
  // Runs of [kind, text]: "same", "ins" (only in the answer), "del" (only in the truth). null: too long to compare.
  const a = pieces(truth, answer), b = pieces(answer, truth);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let endA = a.length, endB = b.length;
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) { endA--; endB--; }
  const n = endA - start, m = endB - start;
  if ((n + 1) * (m + 1) > MAX_CELLS) return null;
  const width = m + 1, lengths = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      lengths[i * width + j] = a[start + i] === b[start + j]
        ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
  const runs = [];
  const add = (kind, text) => {
    if (runs.length && runs[runs.length - 1][0] === kind) runs[runs.length - 1][1] += text;
    else if (text) runs.push([kind, text]);
  };
  add("same", a.slice(0, start).join(""));
  let i = 0, j = 0;
  while (i < n || j < m) {
    if (i < n && j < m && a[start + i] === b[start + j]) { add("same", a[start + i]); i++; j++; }
    else if (i < n && (j === m || lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) add("del", a[start + i++]);
    else add("ins", b[start + j++]);
  }
  add("same", a.slice(endA).join(""));
  return runs;
}

// One prompt

function shownText(text) {
  const shown = element("p", "text", text);
  shown.dir = "auto";
  return shown;
}

function markedText(truth, answer) {
  const runs = differences(truth, answer);
  if (runs === null) return shownText(answer);
  const shown = shownText("");
  for (const [kind, text] of runs) shown.append(kind === "same" ? text : element(kind, "", text));
  return shown;
}

function side(title, className, shown, note) {
  const head = element("h4", "", title);
  if (note) head.append(" ", element("span", "badge", note));
  return element("div", "side " + className, head, shown);
}

function noteOf(truth, answer) {
  const notes = [];
  if (answer.text === truth) notes.push("equal");
  if (answer.cut_off) notes.push("cut off");
  if (!answer.text) notes.push("empty");
  return notes.length ? "(" + notes.join(", ") + ")" : "";
}

function promptCard(prompt, iterations) {
  const source = prompt.source_row ?? prompt.row;
  const card = element("article", "prompt", element("h3", "", `Prompt of row ${source}`));
  for (const [role, text] of prompt.prompt) {
    if (role) card.append(element("div", "role", role));
    card.append(shownText(text));
  }
  const sides = element("div", "sides");
  sides.append(side("Ground truth", "truth", shownText(prompt.truth), ""));
  for (const iteration of iterations)
    (prompt.answers[iteration] ?? []).forEach((answer, number, all) => {
      const title = `Iteration ${iteration}` + (all.length > 1 ? `, answer ${number + 1}` : "");
      sides.append(side(title, "", markedText(prompt.truth, answer.text), noteOf(prompt.truth, answer)));
    });
  card.append(sides);
  return card;
}

// Filter, search, pages

function chosenIterations() {
  return data.iterations.filter((iteration) => byId("iteration-" + iteration).checked);
}

const KINDS = {
  all: () => true,
  different: (answers, truth) => answers.some((answer) => answer.text !== truth),
  equal: (answers, truth) => answers.some((answer) => answer.text === truth),
  cut: (answers) => answers.some((answer) => answer.cut_off),
  changed: (answers) => answers.some((answer) => answer.text !== answers[0].text),
};

function matching(iterations) {
  const query = byId("search").value.trim().toLowerCase();
  const kind = KINDS[byId("kind").value];
  return data.prompts.filter((prompt) => {
    const answers = iterations.flatMap((iteration) => prompt.answers[iteration] ?? []);
    if (!kind(answers, prompt.truth)) return false;
    if (!query) return true;
    const texts = [prompt.truth, ...prompt.prompt.map((part) => part[1]), ...answers.map((answer) => answer.text)];
    return texts.some((text) => text.toLowerCase().includes(query));
  });
}

function show() {
  const iterations = chosenIterations(), found = matching(iterations);
  const numPages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  page = Math.min(Math.max(page, 0), numPages - 1);
  byId("count").textContent = `${found.length.toLocaleString("en")} of ${data.prompts.length.toLocaleString("en")} prompts`;
  byId("page").textContent = `Page ${page + 1} of ${numPages}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === numPages - 1;
  const shown = found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
  byId("prompts").replaceChildren(...shown.map((prompt) => promptCard(prompt, iterations)));
}

function turn(by) {
  page += by;
  show();
  byId("count").scrollIntoView();
}

for (const iteration of data.iterations) {
  const box = element("input");
  box.type = "checkbox";
  box.checked = true;
  box.id = "iteration-" + iteration;
  byId("iterations").append(element("label", "", box, String(iteration)));
}
byId("filter").addEventListener("input", () => { page = 0; show(); });
byId("filter").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
show();

// Charts: the values nearest to the pointer, or, by the arrow keys, one after the other

for (const chart of document.querySelectorAll("svg[data-hover]")) {
  const points = JSON.parse(chart.dataset.hover);
  const cursor = chart.querySelector(".cursor");
  const readout = chart.parentElement.querySelector(".readout");
  let at = -1;
  const pick = (number) => {
    at = Math.min(Math.max(number, 0), points.length - 1);
    cursor.setAttribute("x1", points[at][0]);
    cursor.setAttribute("x2", points[at][0]);
    cursor.classList.add("on");
    readout.textContent = points[at][1];
  };
  const leave = () => { cursor.classList.remove("on"); readout.textContent = ""; at = -1; };
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    let nearest = 0;
    points.forEach((point, number) => { if (Math.abs(point[0] - x) < Math.abs(points[nearest][0] - x)) nearest = number; });
    pick(nearest);
  });
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("blur", leave);
  chart.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    pick(at + (event.key === "ArrowRight" ? 1 : -1));
  });
}
