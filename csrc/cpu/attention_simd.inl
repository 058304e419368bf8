// Included by attention_simd.cpp once for each instruction set, inside that set's namespace and target.
#include "cpu/vec.inl"
#include "cpu/attention_logits.inl"
#include "cpu/attention_softmax.inl"
#include "cpu/attention_fused.inl"
#include "cpu/attention_gradients.inl"
#include "cpu/attention_mass.inl"
