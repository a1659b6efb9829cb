/* Search results in an order that suits people with a question, each with a line of context.
   `SEARCH_CONTEXT` is written by tools/docs_search.py: a page opened from a file may not fetch others. */
"use strict";

// what a page is worth besides the score of Sphinx: answers before the reference, the reference before figures
const PAGE_BONUS = [["guides/", 8], ["tutorials/", 5], ["index", 3], ["commands", 3], ["api/", 0], ["benchmarks/", -4],
                    ["contributing", -6], ["changelog", -8], ["files/", -8]];

const SMALL = new Set("a an and are can do does for how i in is it my of on or the there to what which with".split(" "));
const wordsOf = (text) => new Set(text.toLowerCase().split(/[^\p{Letter}\p{Number}]+/u)
  .filter((word) => word && !SMALL.has(word)).map((word) => (word.length > 3 ? word.replace(/s$/, "") : word)));
const asPattern = (terms) => (terms.length
  ? new RegExp(`(?<![\\p{Letter}\\p{Number}])(${terms.map(_escapeRegExp).join("|")})`, "iu") : null);

// results for phrases that share at least half of their words with the query, or lie in it
const topicResults = (query) => {
  const asked = wordsOf(query), best = new Map();
  for (const [phrase, page, id, heading] of SEARCH_CONTEXT.topics) {
    const own = wordsOf(phrase), common = [...own].filter((word) => asked.has(word)).length;
    const alike = common / new Set([...own, ...asked]).size;
    const share = common === own.size && common > 1 ? Math.max(alike, 0.5) : alike;
    const title = SEARCH_CONTEXT.pages[page][0][1];
    if (share >= 0.5 && share > (best.get(page + id)?.[4] ?? 0) / 100)
      best.set(page + id, [page, `${title} > ${heading}`, "#" + id, null, 100 * share, page, "title"]);
  }
  return [...best.values()];
};

const performSearch = Search._performSearch;
Search._performSearch = (query, ...terms) => {
  const topics = topicResults(query), first = new Set(topics.map((r) => r[0] + r[2]));
  const others = performSearch(query, ...terms).filter((r) => !first.has(r[0] + r[2]));
  for (const r of others) r[4] += (PAGE_BONUS.find(([start]) => r[0].startsWith(start)) ?? ["", 0])[1];
  // Sphinx shows the last one first
  return [...topics, ...others].map((r, i) => [r, i]).sort(([a, i], [b, j]) => a[4] - b[4] || i - j).map(([r]) => r);
};

// the words around the first one that was searched for, or how the section begins
const contextOf = (page, id, pattern) => {
  const sections = SEARCH_CONTEXT.pages[page] ?? [];
  const places = id ? sections.filter(([own]) => own === id) : sections;
  for (const [, heading, text] of places) {
    const at = pattern ? text.search(pattern) : -1;
    if (at < 0) continue;
    const start = at < 60 ? 0 : text.indexOf(" ", at - 60) + 1;
    return [heading, (start ? "… " : "") + text.slice(start, start + 180) + (text.length > start + 180 ? " …" : "")];
  }
  const [, heading, text] = places[0] ?? ["", "", ""];
  return [heading, text.slice(0, 180) + (text.length > 180 ? " …" : "")];
};

const addContext = (item) => {
  const link = item.querySelector("a"), [page, id] = link.getAttribute("href").split("#");
  const terms = [...wordsOf(new URLSearchParams(location.search).get("q") ?? "")].filter((t) => t.length > 1);
  const pattern = asPattern(terms), [heading, text] = contextOf(page.replace(/\.html$/, ""), id ?? "", pattern);
  if (!text) return;
  const line = item.appendChild(document.createElement("p"));
  line.className = "context";
  if (!id && heading && !link.textContent.includes(heading)) line.append(`${heading}: `);
  (pattern ? text.split(pattern) : [text]).forEach((part, i) => {
    const node = i % 2 ? document.createElement("mark") : document.createDocumentFragment();
    node.append(part);
    line.append(node);
  });
};

new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach((node) => {
  if (node.nodeName === "LI" && node.matches("#search-results li") && node.querySelector("a")) addContext(node);
}))).observe(document.documentElement, { childList: true, subtree: true });
