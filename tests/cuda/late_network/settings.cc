#include "settings.h"

#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

namespace jax_ep::late {
namespace {

[[noreturn]] void Refuse(const std::string& name, const std::string& expected,
                         const std::string& text) {
  throw std::runtime_error(name + ": expected " + expected + ", got '" + text + "'");
}

std::optional<std::string> Text(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return std::nullopt;
  return text;
}

uint64_t Number(const std::string& name, const std::string& expected, const std::string& whole,
                const std::string& text, uint64_t most) {
  if (text.empty() || text.size() > 19 || text.find_first_not_of("0123456789") != text.npos) {
    Refuse(name, expected, whole);
  }
  const uint64_t number = std::stoull(text);
  if (number > most) Refuse(name, expected, whole);
  return number;
}

std::optional<uint64_t> Number(const char* name, uint64_t most) {
  const auto text = Text(name);
  if (!text) return std::nullopt;
  return Number(name, "a number from 0 to " + std::to_string(most), *text, *text, most);
}

}  // namespace

Settings ReadSettings() {
  constexpr uint64_t kMostPes = 1 << 20;
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  Settings settings;
  settings.delay_ns = 1000 * Number("JAX_EP_LATE_DELAY_US", 60'000'000).value_or(0);
  settings.seed = Number("JAX_EP_LATE_SEED", kMost).value_or(settings.seed);
  settings.trace = Number("JAX_EP_LATE_TRACE", 1).value_or(0) != 0;
  settings.counts = Text("JAX_EP_LATE_COUNTS").value_or("");
  settings.driver = Text("JAX_EP_LATE_DRIVER").value_or(settings.driver);
  settings.stop_after = Number("JAX_EP_LATE_STOP_AFTER", kMost);
  if (const auto pe = Number("JAX_EP_LATE_FAULTY_PE", kMostPes)) {
    settings.faulty_pe = static_cast<int>(*pe);
  }
  const char* name = "JAX_EP_LATE_DROP_SIGNAL";
  if (const auto text = Text(name)) {
    const std::string expected = "PE:N, with N from 1 on";
    const size_t colon = text->find(':');
    if (colon == text->npos) Refuse(name, expected, *text);
    const uint64_t pe = Number(name, expected, *text, text->substr(0, colon), kMostPes);
    const uint64_t number = Number(name, expected, *text, text->substr(colon + 1), kMost);
    if (number == 0) Refuse(name, expected, *text);
    settings.drop_signal = SignalToDrop{static_cast<int>(pe), number};
  }
  return settings;
}

}  // namespace jax_ep::late
