// Does the file hold what it says it holds? Hashes prove the bytes; stored outputs prove scale,
// mask and rotation; without outputs the keys themselves give evidence about the rotation.
#pragma once
#include <string>
#include <vector>

#include "traces/reader.hpp"

namespace kvreplay {

struct OutputCheck {
  int layer = 0;
  std::size_t n = 0;  // (head, token) pairs that were recomputed
  double worst = 0;   // largest ||recomputed - stored|| / ||stored||
  int worst_head = 0;
  Pos worst_pos = 0;
  double tolerance = 0;
  bool holds() const { return worst <= tolerance; }
};

// Un-rotated keys of a head point in similar directions. What the file declares should therefore
// beat every other reading of it.
struct RopeEvidence {
  int layer = 0;
  double spread_declared = 0,
         spread_other_pairing = 0;  // mean std / mean of pair norms over tokens; smaller is right
  // Mean resultant length of un-rotated pairs; larger is right.
  double resultant_declared = 0, resultant_other_pairing = 0;
  struct Perturbed {
    std::string what;
    double resultant = 0;
  };
  std::vector<Perturbed> perturbed;
  std::string pairing, frequencies;  // "supports", "contradicts" or "says nothing about"
};

struct VerifyReport {
  std::vector<std::string> failures;  // empty = verified; each is one sentence
  std::string hash;                   // what the content hashes to
  bool hash_stored = false;
  std::vector<OutputCheck> outputs;
  std::vector<RopeEvidence> evidence;  // layers without outputs
  std::string text() const;            // lines for people
};

VerifyReport verify(const TraceReader& trace);

}  // namespace kvreplay
