"use strict";
// The browser of answers. Whatever comes from a model or a data set is set as text, never as markup.
(() => {
  const content = JSON.parse(document.getElementById("answers").textContent);
  const images = JSON.parse(document.getElementById("images").textContent);
  const PAGE = 100, LONG = 20000;
  const [QUESTION, COLUMN, OUTPUT, PRED, ACC, FORMAT, EXTRA] = [0, 1, 2, 3, 4, 5, 6];
  const byId = (id) => document.getElementById(id);
  const byQuestion = content.questions.map(() => []);
  content.answers.forEach((answer, index) => byQuestion[answer[QUESTION]].push(index));
  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const NAMES = { ct: "CT", mri: "MRI", xray: "X-ray", oct: "OCT" };
  const nice = (slug) => NAMES[slug] || slug.replaceAll("_", " ");
  let shown = [], page = 0, current = -1;

  function node(tag, text, attributes) {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    return made;
  }
  // Characters that turn text around, hide it or move the cursor are shown by their code.
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  const visible = (text) => text.replace(HIDDEN, (ch) => "[U+" + ch.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "]");
  function textBlock(tag, text, name) {
    const block = node(tag, visible(text.slice(0, LONG)), { class: tag === "pre" ? "" : "text", dir: "auto", tabindex: "0", "aria-label": name });
    if (text.length <= LONG) return [block];
    const more = node("button", `show all ${text.length} characters`, { type: "button" });
    more.addEventListener("click", () => { block.textContent = visible(text); more.remove(); });
    return [block, more];
  }
  function reasoningOf(output) {
    const parts = output.split("<think>");
    if (parts.length !== 2) return "";
    const inner = parts[1].split("</think>");
    return inner.length === 2 && !parts[0].includes("</think>") ? inner[0].trim() : "";
  }
  const columnName = (column) => [column.model, column.control === "none" ? "image as it is" : column.control, column.decoding].join(" · ");
  const verdict = (answer) => (answer[ACC] ? "right" : answer[PRED] ? "wrong" : "unparsed");
  const optionsOf = (answer) => answer[EXTRA].options || content.questions[answer[QUESTION]].options;
  const goldOf = (answer) => answer[EXTRA].answer || content.questions[answer[QUESTION]].answer;
  // Compared by the option's text, since a control may have moved the letters.
  const saidOf = (answer) => (answer[PRED] && optionsOf(answer)[LETTERS.indexOf(answer[PRED])]) || answer[PRED];
  const verdictMark = (answer) => node("span", verdict(answer), { class: "verdict " + verdict(answer) });

  function disagrees(answer, kind) {
    const mine = content.columns[answer[COLUMN]];
    return byQuestion[answer[QUESTION]].some((index) => {
      const other = content.answers[index], column = content.columns[other[COLUMN]];
      if (other === answer || saidOf(other) === saidOf(answer)) return false;
      if (kind === "models") return column.model !== mine.model && column.control === mine.control && column.decoding === mine.decoding;
      return column.model === mine.model && column.control !== mine.control && column.decoding === mine.decoding;
    });
  }
  const QUALITY = {
    "other-modality": (quality) => quality[0] === "other",
    "no-modality": (quality) => quality[0] === "none",
    "not-named": (quality) => quality[1] === false,
    contradicts: (quality) => quality[2] === true,
    template: (quality) => quality[3] >= 0.5,
    "same-without": (quality) => quality[4] === 0,
  };

  function apply() {
    const value = (id) => byId(id).value;
    const column = Number(value("column")), words = value("search").trim().toLowerCase();
    shown = [];
    content.answers.forEach((answer, index) => {
      if (answer[COLUMN] !== column) return;
      const question = content.questions[answer[QUESTION]];
      if (value("modality") && question.modality !== value("modality")) return;
      if (value("type") && question.type !== value("type")) return;
      if (value("verdict") && verdict(answer) !== value("verdict")) return;
      if (value("disagreement") && !disagrees(answer, value("disagreement"))) return;
      if (value("quality") && !(answer[EXTRA].quality && QUALITY[value("quality")](answer[EXTRA].quality))) return;
      if (words && ![question.id, question.question || "", answer[OUTPUT], ...question.options].some((text) => text.toLowerCase().includes(words))) return;
      shown.push(index);
    });
    page = 0;
    draw();
    select(shown.length ? 0 : -1, false);
  }

  function draw() {
    const list = byId("list"), start = page * PAGE;
    list.replaceChildren(...shown.slice(start, start + PAGE).map((index, offset) => {
      const answer = content.answers[index], question = content.questions[answer[QUESTION]];
      const button = node("button", null, { type: "button", "data-place": start + offset });
      const line = node("span", visible((question.question || question.id).slice(0, 160)) + " ", { dir: "auto" });
      button.append(verdictMark(answer), " ", line, node("small", `${nice(question.modality)}, ${nice(question.type)}, ${visible(question.id)}`));
      button.addEventListener("click", () => select(start + offset, false));
      const item = node("li");
      item.append(button);
      return item;
    }));
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    byId("count").textContent = `${shown.length} answers, page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
  }

  function turn(by) {
    const pages = Math.ceil(shown.length / PAGE);
    if (page + by < 0 || page + by >= pages) return;
    page += by;
    draw();
    byId("list").scrollTop = 0;
    select(page * PAGE, false);
  }

  // Scrolls the list alone, never the page.
  function reveal(button) {
    const list = byId("list"), box = list.getBoundingClientRect(), mine = button.getBoundingClientRect();
    if (mine.top < box.top) list.scrollTop -= box.top - mine.top;
    else if (mine.bottom > box.bottom) list.scrollTop += mine.bottom - box.bottom;
  }

  function select(place, focus) {
    if (place >= shown.length || (place < 0 && shown.length)) return;
    current = place;
    if (place >= 0 && Math.floor(place / PAGE) !== page) { page = Math.floor(place / PAGE); draw(); }
    for (const button of byId("list").querySelectorAll("button")) {
      const mine = Number(button.dataset.place) === place;
      button.setAttribute("aria-current", String(mine));
      if (mine) { reveal(button); if (focus) button.focus({ preventScroll: true }); }
    }
    showAnswer(place < 0 ? null : shown[place]);
  }

  const NOT_SEEN = {
    blank: "The model was not shown this image but a uniform grey one of its size.",
    shuffled: "The model was shown the image of another question instead of this one.",
    "text-only": "The model was shown no image; this is the question's own.",
  };
  function pictures(keys, question, note) {
    const box = node("div", null, { class: "pictures" });
    keys.forEach((key, number) => {
      const which = keys.length > 1 ? ` ${number + 1} of ${keys.length}` : "";
      const image = node("img", null, { alt: `${note || nice(question.modality) + " image"}${which}, question ${question.id}`, "data-key": key });
      image.addEventListener("error", () => image.replaceWith(node("p", "The image file is not where the page expects it: keep the folder of images beside the page.")));
      image.src = images[key];
      box.append(image);
    });
    return box;
  }

  function showAnswer(index) {
    const detail = byId("detail");
    if (index === null) { detail.replaceChildren(node("p", "No answer fits these filters.")); return; }
    const answer = content.answers[index], question = content.questions[answer[QUESTION]], extra = answer[EXTRA];
    const column = content.columns[answer[COLUMN]], options = optionsOf(answer), gold = goldOf(answer);
    const parts = [node("h3", visible(question.id))];
    parts.push(node("p", `${nice(question.modality)}, ${nice(question.type)}${question.dataset ? ", " + visible(question.dataset) : ""}. ${columnName(column)}`));
    if (extra.seen) {
      parts.push(node("p", "What the model was shown, by the audit log:"), pictures(extra.seen, question, "image shown under control " + column.control));
      parts.push(node("p", "The question's own image:"), pictures(question.images, question));
    } else {
      if (NOT_SEEN[column.control]) parts.push(node("p", NOT_SEEN[column.control], { class: "notice" }));
      parts.push(question.images.length ? pictures(question.images, question) : node("p", "No image is at hand for this answer."));
    }
    parts.push(node("p", question.question === null ? "The question's text is not at hand." : visible(question.question), { dir: "auto" }));
    const list = node("ol", null, { class: "options" });
    options.forEach((option, number) => {
      const item = node("li"), letter = LETTERS[number];
      item.append(node("span", `${letter}) ${visible(option)} `, { dir: "auto" }));
      const marks = [letter === gold ? "right answer" : "", letter === answer[PRED] ? "given" : ""].filter(Boolean);
      if (marks.length) item.append(node("span", "◀ " + marks.join(", "), { class: "mark" }));
      list.append(item);
    });
    if (options.length) parts.push(list);
    else if (gold) parts.push(node("p", "Right answer: " + visible(gold)));
    const line = node("p");
    line.append(verdictMark(answer), ` ${answer[FORMAT] ? "in the asked form" : "not in the asked form"}${extra.cut ? ", cut off at the length limit" : ""}`);
    parts.push(line);
    const reasoning = reasoningOf(answer[OUTPUT]);
    if (reasoning) parts.push(node("h3", "Reasoning"), ...textBlock("div", reasoning, "Reasoning"));
    if (extra.quality) {
      const [modality, named, contradicts, template, change] = extra.quality, said = [];
      said.push({ right: "names the modality", other: "names another modality only", none: "names no modality" }[modality]);
      if (named !== null) said.push(named ? "names the option answered" : "does not name the option answered");
      if (contradicts) said.push("ends on another option than the answer");
      said.push(`${Math.round(100 * template)} % of its word sequences occur with many other images`);
      if (change !== null) said.push(change === 0 ? "the same text as with the image" : `differs from that with the image by ${Math.round(100 * change)} %`);
      parts.push(node("p", "Counted: " + said.join("; ") + "."));
    }
    parts.push(node("h3", "Raw output"), ...textBlock("pre", answer[OUTPUT], "Raw output"));
    const others = byQuestion[answer[QUESTION]].filter((other) => other !== index);
    if (others.length) {
      const table = node("table"), head = node("tr"), body = node("tbody"), header = node("thead");
      table.append(node("caption", "The same question, asked otherwise"));
      for (const name of ["answers of", "given", "verdict", ""]) head.append(node("th", name, { scope: "col" }));
      header.append(head);
      for (const other of others) {
        const one = content.answers[other], row = node("tr"), cell = node("td"), last = node("td");
        const button = node("button", "show", { type: "button", "aria-label": "show the answer of " + columnName(content.columns[one[COLUMN]]) });
        button.addEventListener("click", () => showAnswer(other));
        last.append(button);
        cell.append(verdictMark(one));
        row.append(node("th", columnName(content.columns[one[COLUMN]]), { scope: "row" }), node("td", visible(one[PRED] ? `${one[PRED]} ${saidOf(one)}` : "-")), cell, last);
        body.append(row);
      }
      table.append(header, body);
      const wide = node("div", null, { class: "wide" });
      wide.append(table);
      parts.push(wide);
    }
    detail.replaceChildren(...parts);
    detail.scrollTop = 0;
  }

  function fill(id, pairs) {
    byId(id).append(...pairs.map(([value, text]) => node("option", text, { value })));
  }
  fill("column", content.columns.map((column, number) => [number, columnName(column)]));
  const values = (key) => [...new Set(content.questions.map((question) => question[key]))].sort().map((slug) => [slug, nice(slug)]);
  fill("modality", values("modality"));
  fill("type", values("type"));
  for (const id of ["column", "modality", "type", "verdict", "disagreement", "quality"]) byId(id).addEventListener("change", apply);
  let waiting = 0;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 200); });
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape" && typing) { event.target.blur(); return; }
    if (typing) return;
    const act = { j: () => select(current + 1, true), k: () => select(current - 1, true), n: () => turn(1), p: () => turn(-1), "/": () => byId("search").focus() }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  apply();
  document.documentElement.dataset.ready = "1";
})();
