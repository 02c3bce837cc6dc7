"use strict";
/* Draw every figure, exchanging light tones for dark ones where the reader's theme is dark. */
(() => {
  const { figures, tones } = JSON.parse(document.getElementById("figures").textContent);
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const toned = (value) => {
    if (typeof value === "string") return tones[value] || value;
    if (Array.isArray(value)) return value.map(toned);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, toned(item)]));
    return value;
  };
  const draw = () => {
    const dark = isDark();
    root.classList.toggle("dark", dark);
    for (const node of document.querySelectorAll("[data-tone]"))
      node.style.color = dark ? toned(node.dataset.tone) : node.dataset.tone;
    for (const { id, plot } of figures) {
      const { data, layout } = dark ? toned(plot) : structuredClone(plot);
      layout.hoverlabel = { ...layout.hoverlabel, bgcolor: dark ? "#1b2027" : "#ffffff" };
      Plotly.react(id, data, layout, { displayModeBar: false, responsive: true });
    }
  };
  const button = document.getElementById("theme");
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    draw();
  });
  system.addEventListener("change", draw);
  draw();
})();
