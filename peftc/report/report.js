"use strict";
(() => {
  const all = (what, where = document) => [...where.querySelectorAll(what)];
  const words = (one, key) => (one.dataset[key] || "").split(" ").filter(Boolean);
  const items = all("[data-is]");
  // What is something (is), what came of it (of), what is inside it (in), by its token.
  const known = { is: new Map(), of: new Map(), in: new Map() };
  for (const one of items)
    for (const key of Object.keys(known))
      for (const word of words(one, key)) {
        if (!known[key].has(word)) known[key].set(word, []);
        known[key].get(word).push(one);
      }
  const found = (key, word) => known[key].get(word) || [];

  function linked(one) {
    const set = new Set([one]);
    for (const word of words(one, "is"))
      for (const key of Object.keys(known)) found(key, word).forEach((other) => set.add(other));
    for (const word of words(one, "of")) found("is", word).forEach((other) => set.add(other));
    return set;
  }

  let pinned = null;
  const clear = (name) => all("." + name).forEach((one) => one.classList.remove(name));

  function hover(one) {
    clear("hot");
    clear("feeds");
    if (!one) return;
    linked(one).forEach((other) => other.classList.add("hot"));
    for (const id of words(one, "reads")) {
      const other = document.getElementById(id);
      if (other) other.classList.add("feeds");
    }
  }

  const quiet = matchMedia("(prefers-reduced-motion: reduce)").matches;

  function show(one) {
    for (let up = one.parentElement; up; up = up.parentElement) if (up.tagName === "DETAILS") up.open = true;
    const pane = one.closest(".pane");
    if (!pane || pane.scrollHeight <= pane.clientHeight) return;
    const top = one.getBoundingClientRect().top - pane.getBoundingClientRect().top + pane.scrollTop;
    pane.scrollTo({ top: top - pane.clientHeight / 3, behavior: quiet ? "auto" : "smooth" });
  }

  function pin(one) {
    clear("lit");
    const state = (other) => (other.getAttribute("role") === "button" ? "aria-pressed" : "aria-current");
    if (pinned) pinned.removeAttribute(state(pinned));
    pinned = one === pinned ? null : one;
    const told = document.getElementById("told");
    if (!pinned) {
      told.textContent = "nothing is marked";
      return;
    }
    pinned.setAttribute(state(pinned), "true");
    const set = linked(pinned);
    set.forEach((other) => other.classList.add("lit"));
    const counts = [];
    for (const pane of all(".pane")) {
      const mine = [...set].filter((other) => pane.contains(other));
      counts.push(`${mine.length} in ${pane.getAttribute("aria-label")}`);
      const first = mine.find((other) => !other.classList.contains("minor"));
      if (first && !pane.contains(pinned)) show(first);
    }
    told.textContent = "marked: " + counts.join(", ");
  }

  document.addEventListener("mouseover", (event) => hover(event.target.closest("[data-is]")));
  document.addEventListener("focusin", (event) => hover(event.target.closest("[data-is]")));
  document.addEventListener("click", (event) => {
    const one = event.target.closest("[data-is]");
    if (one) pin(one);
  });

  // One stop of the tab key a pane; arrows go on from there.
  const seen = (one) => one.offsetParent !== null;
  for (const pane of all(".pane")) {
    const first = all("[data-is]", pane)[0];
    all("[data-is]", pane).forEach((one) => (one.tabIndex = one === first ? 0 : -1));
    pane.addEventListener("keydown", (event) => {
      const now = event.target.closest("[data-is]");
      if (!now || event.altKey || event.ctrlKey || event.metaKey) return;
      const shown = all("[data-is]", pane).filter(seen);
      const at = shown.indexOf(now);
      const block = now.tagName === "SUMMARY" ? now.parentElement : null;
      const goal = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 }[event.key];
      if (goal !== undefined && shown[goal]) {
        now.tabIndex = -1;
        shown[goal].tabIndex = 0;
        shown[goal].focus();
      } else if (event.key === "ArrowRight" && block) block.open = true;
      else if (event.key === "ArrowLeft" && block) block.open = false;
      else if (event.key === "Enter" || event.key === " ") {
        if (block) return; // its own click does it
        pin(now);
      } else return;
      event.preventDefault();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && pinned) pin(pinned);
  });

  const moves = document.getElementById("moves");
  if (moves)
    moves.addEventListener("change", () => document.body.classList.toggle("moves", moves.checked));
  for (const button of all("button[data-open]"))
    button.addEventListener("click", () => {
      const open = button.dataset.open === "yes";
      all("details", button.closest(".pane")).forEach((one) => (one.open = open));
    });
  document.documentElement.dataset.ready = String(items.length);
})();
